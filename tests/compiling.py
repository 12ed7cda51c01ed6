"""A machine with the stand-in for neuronx-cc, programs to compile on it, and models opened there."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from doubles import neuronx_cc as double

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.compiler import neuronx_cc
from jx_neuron.compiler.options import CompilerOptions
from jx_neuron.runtime import neuron

TRN1 = CompilerOptions(target="trn1")


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """Protobuf's wire format of a message."""
    return b"".join(
        varint(n << 3) + varint(v) if isinstance(v, int) else varint(n << 3 | 2) + varint(len(v)) + v for n, v in fields
    )


def module(name: str = "step", opcode: str = "tanh", root: int = 2, *extra: tuple[int, int | bytes]) -> bytes:
    """A serialized HloModuleProto: `opcode` of a parameter f32[4]."""
    shape = message((2, 11), (3, 4), (5, message((1, 0))))
    signature = message((1, shape), (2, shape), (3, b"x"))
    x = message((1, b"x"), (2, b"parameter"), (3, shape), (35, 1))
    y = message((1, b"y"), (2, opcode.encode()), (3, shape), (35, root), (36, 1), *extra)
    main = message((1, b"main"), (2, x), (2, y), (4, signature), (5, 1), (6, root))
    return message((1, name.encode()), (2, b"main"), (3, main), (4, signature), (5, 1), (6, 1))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the stand-in says what it was told, on a machine with it on the PATH, and an empty cache."""
    for name in list(os.environ):
        if name.startswith("NEURON"):
            monkeypatch.delenv(name)
    double.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(neuron, "PRODUCT", tmp_path / "no product")
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv("NEURONX_CC_DOUBLE_LOG", str(log))
    return log


@pytest.fixture
def told(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where the cache is in a folder that was asked for."""
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path / "cache"))
    return log


def opened(folder: Path, backend: str = "neuron", **options: object) -> NeuronAutoModelForCausalLM:
    shape = dict(batch_size=2, tp_degree=2, n_positions=32, context_length_estimate=32) | options
    return NeuronAutoModelForCausalLM.from_pretrained(folder, backend=backend, **shape)


def compiled(*names: str) -> dict[str, bytes]:
    return neuronx_cc.compile_programs({name: module(name) for name in names}, TRN1, jobs=4)


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.neff"))


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def compilers(log: Path) -> list[int]:
    """The processes of compilations and their children, as far as they said so."""
    children = [int(text) for path in log.glob("hanging-*") if (text := path.read_text())]
    return [entry["pid"] for entry in double.invocations(log)] + children


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins by ignoring it
import sys, pathlib
from jx_neuron.compiler import cache as compile_cache, neuronx_cc
held = compile_cache.lock
def lock(*arguments):
    pathlib.Path(sys.argv[2]).touch()
    return held(*arguments)
compile_cache.lock = lock
print(len(neuronx_cc.compile_programs({"step": pathlib.Path(sys.argv[1]).read_bytes()})["step"]))
"""


def process(tmp_path: Path, mark: str) -> "subprocess.Popen[str]":
    """Another process that compiles the program, and touches `mark` when it is about to lock it."""
    (tmp_path / "step.pb").write_bytes(module())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "step.pb"), str(tmp_path / mark)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
