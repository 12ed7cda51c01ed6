"""Checkpoints and adapters on the Hub, against a server that answers as it does."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    CONFIG,
    TENSORS,
    run,
    write,
    write_bin,
)


class Hub(BaseHTTPRequestHandler):
    """The two calls of the Hub's API that a download makes, over the folder `server.root`; anything else is 404."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, body, kind, **headers):
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        files = sorted(path for path in self.server.root.iterdir() if path.is_file())
        path = self.path.split("?")[0]
        if re.fullmatch(r"/api/models/org/model(/revision/(main|v1|[0-9a-f]{40}))?", path):
            siblings = [{"rfilename": file.name} for file in files]
            body = {"id": "org/model", "modelId": "org/model", "sha": self.COMMIT, "siblings": siblings}
            return self.answer(json.dumps(body).encode(), "application/json")
        if re.fullmatch(r"/api/models/org/model/tree/(main|v1|[0-9a-f]{40})", path):
            body = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            return self.answer(json.dumps(body).encode(), "application/json")
        found = re.fullmatch(r"/org/model/resolve/(main|v1|[0-9a-f]{40})/([\w.-]+)", path)
        if found and (self.server.root / found[2]).is_file():
            self.server.served.add(found[2])
            body = (self.server.root / found[2]).read_bytes()
            return self.answer(body, "application/octet-stream", ETag=f'"{found[2]}"', X_Repo_Commit=self.COMMIT)
        code = "RevisionNotFound" if "/org/model/revision/" in path else "RepoNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.served = tmp_path / "hub", set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


OPEN = """
import json, sys
from jx_neuron.checkpoint.folder import load_config, open_checkpoint, token_ids
from jx_neuron.errors import CheckpointError
for name, options in json.loads(sys.argv[1]):
    try:
        if options.pop("config", False):
            print(load_config(name, **options))
        else:
            opened = open_checkpoint(name, **options)
            print(sorted(opened.names()), opened.read("h.1.index").tolist(), opened.path.name)
    except CheckpointError as error:
        print("refused:", error)
"""


def test_hub(tmp_path, hub):
    write_bin(write(hub.root))
    (hub.root / "tokenizer.json").write_text("{}")
    (hub.root / "model.fp16.safetensors").write_bytes(b"not wanted")
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}

    def opened(*calls, offline="0"):
        return run(OPEN, json.dumps(calls), **environment, HF_HUB_OFFLINE=offline).splitlines()

    model, other = "org/model", "org/other"
    assert opened((model, {"config": True})) == [str(CONFIG)]
    assert hub.served == {"config.json"}
    expected = f"{sorted(TENSORS)} {list(range(7))} {Hub.COMMIT}"
    *found, nothing, revision = opened(
        (model, {}), (model, {"revision": "v1"}), (other, {}), (model, {"revision": "v2"})
    )
    assert found == [expected] * 2
    assert hub.served == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "no repository of that name" in nothing
    assert "no revision 'v2'" in revision

    for file in ("model.safetensors", "pytorch_model.bin"):
        (hub.root / file).unlink()
    (hub.root / "m.gguf").write_bytes(b"GGUF")
    (stub,) = opened((model, {"config": True}))
    assert "holds its configuration in m.gguf" in stub
    assert "hf download org/model m.gguf" in stub
    assert "m.gguf" not in hub.served

    hub.shutdown()
    hub.server_close()
    *found, unreachable = opened((model, {}), (model, {"local_files_only": True}), (other, {}))
    assert found == [expected] * 2
    assert unreachable.startswith(f"refused: there is no folder {other!r} here, the Hub cannot be reached")
    assert f"hf download {other}" in unreachable
    found, unreachable = opened((model, {}), (other, {}), offline="1")
    assert found == expected
    assert "HF_HUB_OFFLINE is set" in unreachable


OPEN_ADAPTER = """
from jx_neuron.checkpoint.lora import open_adapter
from jx_neuron.errors import CheckpointError
try:
    print({name: pair.shape for name, pair in open_adapter("org/model").pairs.items()})
except CheckpointError as error:
    print("refused:", error)
"""


def test_an_adapter_on_the_hub(tmp_path, hub):
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}
    hub.root.mkdir()
    (hub.root / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q"]}')
    (hub.root / "README.md").write_text("not wanted")
    refusal = run(OPEN_ADAPTER, **environment)
    assert "refused: org/model on the Hub holds no adapter" in refusal
    a, b = np.zeros((2, 5), np.float32), np.zeros((7, 2), np.float32)
    tensors = {f"base_model.model.h.0.q.lora_{part}.weight": array for part, array in (("A", a), ("B", b))}
    safetensors.numpy.save_file(tensors, hub.root / "adapter_model.safetensors")
    assert run(OPEN_ADAPTER, **environment).strip() == "{'h.0.q': (7, 5)}"
    assert hub.served == {"adapter_config.json", "adapter_model.safetensors"}
