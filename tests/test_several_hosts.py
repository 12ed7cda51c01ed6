"""Several processes give the tokens of one, and end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import serving
import tiny
import torch
import transformers
import yaml
from families import OPTIONS
from safetensors.numpy import save_file
from several_hosts import memory

from jx_neuron import SamplingParams, distributed
from jx_neuron.distributed.frames import Message, ProtocolError, receive
from jx_neuron.distributed.hosts import PORT, Hosts
from jx_neuron.distributed.shared import key_of
from jx_neuron.errors import InputError
from jx_neuron.step.program_key import ProgramKey

SCRIPT = Path(__file__).with_name("several_hosts.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def processes(commands: list[list[object]]) -> Iterator[list[subprocess.Popen[str]]]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    started = [subprocess.Popen([sys.executable, *map(str, command)], **pipes) for command in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def spread(folder: Path, out: Path, count: int, tp: int, what: str = "answers") -> list[list[object]]:
    out.mkdir()
    port = free_port()
    return [[SCRIPT, rank, count, port, tp, folder, out, what] for rank in range(count)]


def answers(folder: Path, out: Path, count: int, tp: int) -> dict[str, list[object]]:
    with processes(spread(folder, out, count, tp)) as started:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    return json.loads((out / "answers.json").read_text())


def same(one: dict[str, list[object]], several: dict[str, list[object]]) -> None:
    np.testing.assert_allclose(several.pop("logits"), one.pop("logits"), atol=1e-4)
    assert several == one


def checkpoint(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **OPTIONS[name][0])
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tp"), [(2, 4), (4, 8)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_the_tokens_of_one_process(name: str, count: int, tp: int, tmp_path: Path) -> None:
    folder = tiny.saved("llama", tmp_path / "model") if name == "llama" else checkpoint(name, tmp_path / "model")
    same(answers(folder, tmp_path / "one", 1, tp), answers(folder, tmp_path / "several", count, tp))


def random_llama(folder: Path, **sizes: int) -> Path:
    """A Llama of ten layers in float32."""
    numbers = np.random.default_rng(0)
    config = transformers.LlamaConfig(
        **tiny.SPECIAL, num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=8,
        architectures=["LlamaForCausalLM"], **sizes,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.AutoModelForCausalLM.from_config(config).named_parameters()}
    save_file({k: numbers.random(s, np.float32) / 10 - 0.05 for k, s in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """734 MB."""
    folder = tmp_path_factory.mktemp("large")
    yield random_llama(folder, hidden_size=1024, intermediate_size=2816, vocab_size=32000)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tp"), [(2, 4), (4, 8)])
def test_a_process_takes_its_share_of_memory_to_load(count: int, tp: int, large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with processes(spread(large, out, count, tp, "weights")) as started:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    for rank in range(count):
        most, share = json.loads((out / f"taken-{rank}.json").read_text())
        print(f"{most / share:.3f}")
        assert share > 700e6 / count
        assert most <= 1.25 * share


def wait_for(path: Path, started: list[subprocess.Popen[str]], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in started), [p.communicate() for p in started]
        time.sleep(0.05)


def peaks(folder: Path, out: Path, count: int, tp: int) -> list[int]:
    """The most memory of each process, in bytes, after all of `several_hosts.answers`."""
    with processes(spread(folder, out, count, tp, "wait")) as started:
        wait_for(out / "ready", started)
        return [memory("VmHWM", process.pid) for process in started]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tp"), [(2, 4), (4, 8)])
def test_a_process_takes_its_share_of_memory_and_a_quarter(count: int, tp: int, large: Path, tmp_path: Path) -> None:
    """Beside what it takes for the same programs of a model of 2 MB."""
    narrow = random_llama(tmp_path / "narrow", hidden_size=64, intermediate_size=176, vocab_size=320)
    small = peaks(narrow, tmp_path / "out-small", count, tp)
    config = json.loads((large / "config.json").read_text())
    state = 2 * 4 * 96 * config["num_hidden_layers"] * config["num_key_value_heads"] * 64 * 4
    share = ((large / "model.safetensors").stat().st_size + state) / count
    for rank, most in enumerate(peaks(large, tmp_path / "out", count, tp)):
        print(f"{most / 1e6:.0f} MB, {small[rank] / 1e6:.0f} MB: {(most - small[rank]) / share:.3f}")
        assert share < most - small[rank] <= 1.25 * share


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_all(victim: int, number: int, tmp_path: Path) -> None:
    folder = tiny.saved("llama", tmp_path / "model")
    with processes(spread(folder, tmp_path / "out", 2, 2, "wait")) as started:
        wait_for(tmp_path / "out" / "ready", started)
        began = time.monotonic()
        started[victim].send_signal(number)
        _, errors = started[1 - victim].communicate(timeout=30)
        assert time.monotonic() - began < 30
        assert started[1 - victim].returncode == 1
        assert f"process {victim} of 2 is gone" in errors


@contextmanager
def server(folder: Path) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """The processes of a server of two, and its address once it is ready."""
    hosts = ["--hosts", f"127.0.0.1:{free_port()},127.0.0.1", "--tp", 2, "--n-positions", 64, "--batch-size", 2]
    serve = ["-m", "jx_neuron", "serve", folder, "--port", 0, "--json", *hosts, "--host-rank"]
    with processes([[*serve, 0], [*serve, 1]]) as started:
        line = started[0].stdout.readline()
        assert line, started[0].communicate()
        url = json.loads(line)["url"]
        serving.wait_until_ready(url)
        yield started, url


def complete(url: str, **body: object) -> list[int]:
    body = dict(max_tokens=16, temperature=0, ignore_eos=True, return_token_ids=True) | body
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_server_of_two_processes(to: int, number: int, tmp_path: Path) -> None:
    folder = serving.checkpoint(tmp_path / "model")
    prompts = [[5, 9, 2, 11], [7] * 9, list(range(1, 30))]
    greedy = SamplingParams(max_tokens=16, top_k=1, eos_token_id=-1)
    expected = [list(answer.answers[0].ids) for answer in serving.model(folder).generate(prompts, greedy)]
    with server(folder) as (started, url):
        assert complete(url, prompt="abc")
        assert [complete(url, prompt=prompt) for prompt in prompts] == expected  # while programs are loaded
        with ThreadPoolExecutor(len(prompts)) as threads:
            assert list(threads.map(lambda prompt: complete(url, prompt=prompt), prompts)) == expected
        began = time.monotonic()
        started[to].send_signal(number)
        for process in started:
            output, errors = process.communicate(timeout=30)
            assert process.returncode == 0, errors
            assert "Traceback" not in errors
            assert output == ""  # beside the line with the address
        assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_ends_with_a_process_that_dies(victim: int, tmp_path: Path) -> None:
    def ask(url: str) -> None:
        while True:
            complete(url, prompt=[5, 9, 2])

    with server(serving.checkpoint(tmp_path / "model")) as (started, url), ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask, url) for _ in range(2)]
        time.sleep(0.5)
        assert not any(one.done() for one in asked), [one.exception() for one in asked]
        started[victim].kill()
        _, errors = started[1 - victim].communicate(timeout=30)
        assert started[1 - victim].returncode == 1
        assert f"process {victim} of 2 is gone" in errors
        assert "Traceback" not in errors
        print(errors)


def test_hosts_of_a_list_and_of_launchers() -> None:
    assert Hosts.of("127.0.0.1:9000,b", 1) == Hosts("127.0.0.1", 9000, 2, 1)
    assert Hosts.of("192.0.2.1,127.0.0.1") == Hosts("192.0.2.1", PORT, 2, 1)
    torchrun = dict(RANK="3", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="29500")
    assert Hosts.of("auto", environment=torchrun) == Hosts("a", 29501, 4, 3)
    slurm = dict(SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_JOB_ID="4007", SLURM_STEP_NODELIST="trn-[012-013],x")
    assert Hosts.of("auto", environment=slurm) == Hosts("trn-012", PORT + 7, 2, 1)
    lws = dict(LWS_LEADER_ADDRESS="s-0.s.default", LWS_GROUP_SIZE="2", LWS_WORKER_INDEX="0")
    assert Hosts.of("auto", environment=lws) == Hosts("s-0.s.default", PORT, 2, 0)


@pytest.mark.parametrize(
    ("hosts", "rank", "message"),
    [
        ("auto", None, "there is no launcher"),
        ("127.0.0.1,127.0.0.1", None, "2 of the hosts .* --host-rank"),
        ("127.0.0.1,,", 0, "write host1,host2"),
        ("127.0.0.1:x", 0, "write host1,host2"),
        ("127.0.0.1", 1, "process 1 of 1"),
    ],
)
def test_hosts_that_cannot_be(hosts: str, rank: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Hosts.of(hosts, rank, environment={})


def test_program_keys_are_the_same_after_a_message() -> None:
    key = ProgramKey("verify", 2, 4, 64, candidates=8, taps=(1, 3), guesses=2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(Message("load", {"keys": [asdict(key)]}).encoded())
        message = receive(theirs)
    assert message is not None
    assert {key_of(fields) for fields in message.fields["keys"]} == {key}


def test_ranks_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.ranks("neuron", 8) is None  # no group
    group = SimpleNamespace(hosts=Hosts("a", PORT, 2, 1))
    monkeypatch.setattr(distributed, "_group", group)
    monkeypatch.setattr(distributed, "_backend", "neuron")
    assert distributed.ranks("neuron", 8) == range(4, 8)
    with pytest.raises(InputError, match="2 processes cannot share tp_degree=3"):
        distributed.ranks("neuron", 3)
    with pytest.raises(InputError, match="joined for backend 'neuron', and the model is of 'host'"):
        distributed.ranks("host", 8)
    monkeypatch.setattr(distributed, "_backend", "xla")
    assert distributed.ranks("xla", 8) is None


def test_the_pods_of_the_example_serve_one_model() -> None:
    example = yaml.safe_load((SCRIPT.parent.parent / "examples" / "leaderworkerset.yaml").read_text())
    pods = example["spec"]["leaderWorkerTemplate"]
    (container,) = pods["workerTemplate"]["spec"]["containers"]
    program, command, folder, *arguments = container["args"]
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert (program, command) == ("jx-neuron", "serve")
    assert options["--hosts"] == "auto"
    assert int(options["--tp"]) % pods["size"] == 0
    assert any(Path(folder).is_relative_to(mount["mountPath"]) for mount in container["volumeMounts"])


def test_messages_arrive_whole_and_others_are_refused() -> None:
    arrays = {"tokens_bt": np.arange(6, dtype=np.int32).reshape(2, 3), "empty": np.zeros((0, 2), np.float32)}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(Message("run", {"runtime": 1}, arrays).encoded() + Message("beat").encoded())
        message, beat = receive(theirs), receive(theirs)
        assert message is not None
        assert (message.kind, message.fields, beat) == ("run", {"runtime": 1}, Message("beat"))
        for name, array in arrays.items():
            np.testing.assert_array_equal(message.arrays[name], array)
        ours.sendall(Message("beat").encoded()[:-3])
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError):
            receive(theirs)
    for listed in ([["a", "object", [1]]], [["a", "int32", [2**40]]], [["a", "int32", [-1]]], [3], 3):
        header = json.dumps(["run", {}, listed]).encode()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(len(header).to_bytes(4, "big") + header)
            with pytest.raises(ProtocolError):
                receive(theirs)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ProtocolError, match=re.escape("claims a header")):
            receive(theirs)
