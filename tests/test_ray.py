"""Ray Serve: what the router does when replicas die; and Ray itself, where RAY_PYTHON names a Python that has it."""

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import serving
from starlette.applications import Starlette

from jx_neuron import InputError, SamplingParams
from jx_neuron.serve import ServerSettings

ROOT = Path(__file__).parent.parent
RAY = "jx_neuron.integrations.ray"
SERVER = """
import os, sys, time
from pathlib import Path
import ray
from ray import serve
from jx_neuron.integrations.ray import application

if __name__ == "__main__":
    folder, temporary, port = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=temporary)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application(folder, replicas=2, batch_size=4, n_positions=96))
    while not Path(temporary, "stop").exists():
        states = serve.status().applications["default"].deployments["Replica"].replica_states
        Path(temporary, "next").write_text(str(states.get("RUNNING", 0)))
        os.replace(Path(temporary, "next"), Path(temporary, "running"))
        time.sleep(0.2)
    serve.shutdown()
    ray.shutdown()
"""
KINDS, CALLERS, SHARED, LOADED = 8, 8, 24, 80
START = dict(type="http.response.start", status=200, headers=[(b"content-type", b"text/event-stream")])


def test_without_ray_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, RAY, raising=False)
    with pytest.raises(InputError, match=r"pip install 'ray\[serve\]', the extra ray"):
        import_module(RAY)


class DiedError(Exception):
    """Ray's RayActorError."""


class FullError(Exception):
    """Ray's BackPressureError."""


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module on a stand-in for Ray, which has the names that it imports and no more."""
    modules = {
        "ray": SimpleNamespace(),
        "ray.serve": SimpleNamespace(Application=object),
        "ray.exceptions": SimpleNamespace(RayActorError=DiedError),
        "ray.serve.exceptions": SimpleNamespace(BackPressureError=FullError),
    }
    modules["ray"].serve = modules["ray.serve"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, RAY, raising=False)
    yield import_module(RAY)
    sys.modules.pop(RAY)


def body(text: str, more: bool = False) -> dict:
    return dict(type="http.response.body", body=text.encode(), more_body=more)


class Handle:
    """Ray's handle of a deployment: each call takes the next script, of messages and of errors to raise."""

    def __init__(self, *scripts: list):
        self.scripts, self.answer = list(scripts), SimpleNamespace(remote=self.remote)

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    async def remote(self, scope: dict, content: bytes) -> AsyncIterator[dict]:
        assert (scope["method"], scope["path"], content) == ("POST", "/v1/completions", b"{}")
        json.dumps({k: v for k, v in scope.items() if k not in ("headers", "raw_path", "query_string")})  # plain data
        for message in self.scripts.pop(0):
            if isinstance(message, Exception):
                raise message
            yield message


def answer(integration: ModuleType, handle: Handle) -> httpx.Response:
    application: Starlette = integration.Router(handle, ServerSettings(names=("m",))).__serve_build_asgi_app__()

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://r") as client:
            return await client.post("/v1/completions", content=b"{}")

    return asyncio.run(post())


def test_another_replica_answers_where_nothing_was_sent(integration: ModuleType) -> None:
    died = DiedError()
    assert answer(integration, Handle([died], [START, died], [START, body("whole")])).text == "whole"
    response = answer(integration, Handle(*[[died]] * integration.MOST_REPLICAS))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_failed"


def test_a_stream_that_has_begun_ends_with_an_error(integration: ModuleType) -> None:
    handle = Handle([START, body("data: 1\n\n", True), DiedError()])
    first, error, done = answer(integration, handle).text.split("\n\n", 2)
    assert (first, done) == ("data: 1", "data: [DONE]\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_failed"


def test_a_full_queue_is_told_to_try_again(integration: ModuleType) -> None:
    response = answer(integration, Handle([FullError(7, 7)]))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert "7 requests wait" in response.json()["error"]["message"]


# ---- with Ray


class Ray:
    """A Ray of two CPUs with two replicas of a model."""

    def __init__(self, folder: Path, temporary: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.temporary, self.log, self.url = temporary, temporary / "log", f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "200000"}
        environment |= {"RAY_raylet_start_wait_time_s": "200", "RAY_worker_register_timeout_seconds": "200"}
        self.process = subprocess.Popen(
            [os.environ["RAY_PYTHON"], "-c", SERVER, str(folder), str(temporary), str(port)],
            stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip

    def __enter__(self) -> "Ray":
        return self

    def __exit__(self, *_: object) -> None:
        (self.temporary / "stop").touch()
        try:
            self.process.wait(120)
        finally:
            self.process.kill()

    def wait_for(self, running: int, seconds: float) -> float:
        """Waits until as many replicas run, all of them processes. Returns the seconds that it took."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            status = self.temporary / "running"
            if status.exists() and status.read_text() == str(running) and len(self.replicas()) == running:
                return time.monotonic() - began
            time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-4000:])

    def replicas(self) -> set[int]:
        """The processes of the model's replicas, below the raylet of this Ray."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if b"ServeReplica:default:Replica" in (path / "cmdline").read_bytes():
                    parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                    if str(self.temporary).encode() in Path("/proc", parent, "cmdline").read_bytes():
                        found.add(int(path.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found


def shape(kind: int) -> dict:
    """A request; all of a kind have the same tokens, whichever replica answers."""
    return dict(prompt=[kind + 1, 5, 7], max_tokens=90, temperature=0, ignore_eos=True, return_token_ids=True)


async def ids(client: httpx.AsyncClient, kind: int) -> list[int]:
    response = await client.post("/v1/completions", json=shape(kind))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


async def streamed(client: httpx.AsyncClient, kind: int) -> tuple[list[int], str | None]:
    """The tokens of a stream, and the code of the error that ended it."""
    tokens: list[int] = []
    async with client.stream("POST", "/v1/completions", json=shape(kind) | dict(stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return tokens, None
            if line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return tokens, event["error"]["code"]
                tokens += event["choices"][0]["token_ids"]
    raise AssertionError("a stream ended without its end")


async def served(client: httpx.AsyncClient) -> set[int]:
    """How many answers each replica has given, by replicas that answer at random."""
    texts = [(await client.get("/metrics")).text for _ in range(40)]
    return {
        sum(int(float(n)) for n in re.findall(r"^vllm:request_success_total{.*} (\S+)$", text, re.M)) for text in texts
    }


async def load(ray: Ray, folder: Path) -> dict[str, object]:
    model = serving.model(folder)
    expected = []
    for kind in range(KINDS):
        sampling = SamplingParams(max_tokens=90, top_k=1, eos_token_id=-1)
        expected.append(list(model.generate([[kind + 1, 5, 7]], sampling)[0].ids))
    limits = httpx.Limits(max_connections=2 * CALLERS, keepalive_expiry=1)  # Ray's proxy closes after 5 s
    async with httpx.AsyncClient(base_url=ray.url, timeout=300, limits=limits) as client:
        numbers = iter(range(SHARED))

        async def caller() -> None:
            for number in numbers:
                assert await ids(client, number % KINDS) == expected[number % KINDS]

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        shares = await served(client)
        assert sum(shares) == SHARED or [2 * share for share in shares] == [SHARED], shares
        assert min(shares) >= SHARED // 4, shares

        numbers, killed, broken = iter(range(LOADED)), sorted(ray.replicas())[0], 0

        async def streamer() -> None:
            nonlocal broken
            for number in numbers:
                tokens, error = await streamed(client, kind := number % KINDS)
                assert error in (None, "engine_failed")
                assert tokens == expected[kind][: len(tokens)]
                assert error or len(tokens) == len(expected[kind])
                broken += error is not None

        async def kill() -> float:
            while next(numbers) < LOADED // 4:
                await asyncio.sleep(0.2)
            os.kill(killed, signal.SIGKILL)
            return time.monotonic()

        *_, when = await asyncio.gather(*(caller() for _ in range(CALLERS)), streamer(), streamer(), kill())
        await asyncio.to_thread(ray.wait_for, 2, 300)
        back = time.monotonic() - when
        assert killed not in ray.replicas()
        again = ray.log.read_text().count("a replica died with a request")
        assert again > broken, "no request was under way at the replica"
        numbers = iter(range(SHARED))
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        assert len(await served(client)) == 2  # the new one answers too
        return dict(shares=sorted(shares), sent_again=again - broken, broken_streams=broken, back=round(back, 1))


@pytest.mark.slow
@pytest.mark.skipif("RAY_PYTHON" not in os.environ, reason="RAY_PYTHON names no Python with Ray Serve")
def test_a_replica_that_is_killed_loses_no_whole_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = serving.checkpoint(tmp_path / "tiny")
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary,  # Ray's sockets take a short path
        Ray(folder, Path(temporary)) as ray,
    ):
        ray.wait_for(2, 480)
        result = asyncio.run(load(ray, folder))
    with capsys.disabled():
        print(result)


@pytest.mark.slow
@pytest.mark.skipif("RAY_LLM_PYTHON" not in os.environ, reason="RAY_LLM_PYTHON names no Python with Ray, vLLM and this")
def test_the_example_with_ray_serve_llm(tmp_path: Path) -> None:
    folder = serving.checkpoint(tmp_path / "tiny")
    expected = serving.model(folder).generate([[1, 5, 7]], SamplingParams(max_tokens=20, top_k=1, eos_token_id=-1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    log = tmp_path / "log"
    command = [os.environ["RAY_LLM_PYTHON"], ROOT / "examples" / "ray_serve_llm.py", folder]
    command += ["--n-positions", 96, "--batch-size", 4, "--port", port]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary, log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=output, env=environment | {"RAY_TMPDIR": temporary}
        )
        try:
            answer = asked(f"http://127.0.0.1:{port}", process, log)
            assert answer["choices"][0]["token_ids"] == list(expected[0].ids)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def asked(url: str, process: subprocess.Popen, log: Path, seconds: float = 400) -> dict:
    """The first answer of a server, once it gives one."""
    body = dict(model="model", prompt=[1, 5, 7], max_tokens=20, temperature=0, ignore_eos=True, return_token_ids=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            if response.status_code == 200:
                return response.json()
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
