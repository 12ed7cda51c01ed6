"""A server on a free port of this machine, in a thread of its own."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import httpx
import tiny
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jx_neuron import LlamaForSampling
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.serve import AsyncEngine, Server, ServerSettings, app

TEMPLATE = (
    "{% if tools %}<tool_call>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments.x }}{% endfor %}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};a:{% endif %}{{ suffix or '' }}"
)


def checkpoint(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A tiny Llama with a token for each printable ASCII character, as bytes of which grammars are made, and six
    special ones, the first of them the end."""
    tiny.saved("llama", folder)
    characters = {"\u0120" if i == 0 else chr(32 + i): i for i in range(95)}
    backend = Tokenizer(models.BPE(vocab=characters | {f"<{i}>": 95 + i for i in range(6)}, merges=[]))
    backend.add_special_tokens([f"<{i}>" for i in range(6)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<0>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=95).save_pretrained(folder)
    return folder


def demo_checkpoint(folder: Path) -> transformers.LlamaForCausalLM:
    """Saves the demo model's weights in float32, and its tokenizer, as HF does."""
    checkpoint = open_checkpoint(demo_model())
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config))
    hf.load_state_dict({name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names()}, strict=False)
    hf.save_pretrained(folder)
    checkpoint.tokenizer().save_pretrained(folder)
    return hf


def model(folder: Path, **options: object) -> LlamaForSampling:
    return LlamaForSampling.from_pretrained(folder, **{"batch_size": 4, "n_positions": 96, **options})


def wait_until_ready(url: str, seconds: float = 120, process: subprocess.Popen | None = None) -> None:
    """Waits for /health; with a process that may not listen yet, and may end, for its port too."""
    end = time.monotonic() + seconds
    while True:
        with suppress(httpx.ConnectError) if process is not None else nullcontext():
            if httpx.get(f"{url}/health").status_code == 200:
                return
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.05)


@contextmanager
def running(model: object, *, most_waiting: int = 64, **settings: object) -> Iterator[str]:
    """Yields the server's address."""
    chosen = ServerSettings(names=("tiny", "other"), **{"drain_seconds": 1.0, **settings})
    listening, port = threading.Event(), []

    def ready(number: int) -> None:
        port.append(number)
        listening.set()

    application = app(model, AsyncEngine(model, most_waiting=most_waiting), chosen)
    server = Server(application, chosen, "127.0.0.1", 0, ready=ready)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert listening.wait(60)
    url = f"http://127.0.0.1:{port[0]}"
    wait_until_ready(url)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Process:
    """jx-neuron serve as a process of its own."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "jx_neuron", "serve", str(folder), "--port", "0", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.about = json.loads(line)
        self.url = self.about["url"]
        wait_until_ready(self.url)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors
