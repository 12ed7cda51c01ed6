"""Ctrl-C: status 130 at once, whatever the command line is doing, with nothing said and nothing half-written."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from compiling import alive, compilers, eventually
from doubles import neuronx_cc

from jx_neuron.artifact import folder as artifact
from jx_neuron.checkpoint import open_checkpoint

# as the installed command does, but that a line says when it begins; a shell may have had SIGINT ignored
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
COMMAND = START + "from jx_neuron.cli import main; print('begun', flush=True); main()"
OVER_SECONDS, PROMPT_SECONDS = 0.5, 4  # about one second, and what a busy machine adds
INSTALLED = START + "from jx_neuron.cli import interrupts; interrupts.install()\n"


@dataclass
class Ended:
    status: int
    signalled: bool
    seconds: float
    printed: str
    errors: str


class Running:
    """A process that has said that it begins."""

    def __init__(self, code: str, *arguments: object, **environment: str):
        root = str(Path(__file__).parent.parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", **environment},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "begun\n", self.process.communicate()

    def interrupted(self, after: float = 0.0) -> Ended:
        """How it ended: of itself where it takes less than `after` seconds, else interrupted then."""
        signalled = False
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            signalled = True
        began = time.monotonic()
        printed, errors = self.process.communicate(timeout=60)
        return Ended(self.process.returncode, signalled, time.monotonic() - began, printed, errors)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer())


def interrupt(checkpoint: Path, here: Path, command: str, times: int) -> None:
    """Interrupts `command` at seeded random times of its run, and looks at what is left each time."""
    out, temporary = here / "out" / "artifact", here / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(here / "cache"), "PYTHONWARNINGS": "ignore"}
    arguments = {
        "compile": ("compile", checkpoint, "--tp", 2, "--hlo-only", "--n-positions", 64, "-o", out),
        "sample": ("sample", checkpoint, "abc", "--max-new-tokens", 60),
        "plan": ("plan", checkpoint, "--exact"),
        "quantize": ("quantize", checkpoint, "-o", out),
    }[command]

    def running() -> Running:
        return Running(COMMAND, *arguments, **environment)

    began = time.monotonic()
    assert running().interrupted(after=60).status == 0
    whole = time.monotonic() - began
    draw, ends = random.Random(command), []
    while len(ends) < times:
        shutil.rmtree(out, ignore_errors=True)
        ended = running().interrupted(after=draw.uniform(0, whole))
        if ended.status == 0:  # it was over before, or on its last instructions
            assert not ended.signalled or ended.seconds < OVER_SECONDS
            continue
        ends.append(ended)
        assert (ended.status, ended.errors) == (130, "")
        assert ended.seconds < PROMPT_SECONDS
        assert list(temporary.iterdir()) == []
        if out.parent.is_dir():
            assert {path.name for path in out.parent.iterdir()} <= {out.name}
        if out.exists():
            (open_checkpoint if command == "quantize" else artifact.read)(out)


@pytest.mark.parametrize(
    "command", ["compile", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sample", "quantize"))]
)
def test_a_few_interrupts(command: str, checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path, command, 2)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compile", "sample", "plan", "quantize"])
def test_forty_interrupts(command: str, checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path, command, 40)


SWALLOWED = """
import gc, time
def callback(phase, info):
    gc.callbacks.clear()
    print("begun", flush=True)
    time.sleep(20)
gc.callbacks.append(callback)
gc.collect()
time.sleep(20)
print("went on")
"""
CAUGHT = """
import time
print("begun", flush=True)
for _ in range(20):
    try:
        time.sleep(1)
    except BaseException:
        pass
print("went on")
"""
IN_C = """
import hashlib
print("begun", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
print("went on")
"""
TURNED = """
import time
print("begun", flush=True)
try:
    time.sleep(20)
except BaseException as error:
    raise RuntimeError("of a library") from error
"""
POOL = """
import time
from concurrent.futures import ThreadPoolExecutor
def work():
    print("begun", flush=True)
    try:
        while True:
            time.sleep(0.01)
    finally:
        print("cleaned", flush=True)
with ThreadPoolExecutor() as pool:
    pool.submit(work).result()
"""


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        pytest.param(SWALLOWED, "", id="lost in a callback of the garbage collector"),
        pytest.param(CAUGHT, "", id="caught"),
        pytest.param(IN_C, "", id="while in C"),
        pytest.param(TURNED, "", id="turned into another error"),
        pytest.param(POOL, "cleaned\n", id="waiting for a pool of threads"),
    ],
)
def test_nothing_outlives_an_interrupt(code: str, printed: str) -> None:
    ended = Running(INSTALLED + code + "interrupts.leave(0)").interrupted(after=0.1)
    assert (ended.status, ended.printed, ended.errors) == (130, printed, "")
    assert ended.seconds < PROMPT_SECONDS


def test_an_interrupt_of_the_end_itself() -> None:
    code = """
import signal, threading
def again():
    interrupts._due.set()
    signal.raise_signal(signal.SIGINT)
    print("cleaned", flush=True)
interrupts.at_end.append(again)
print("begun", flush=True)
threading.Event().wait()
"""
    ended = Running(INSTALLED + code).interrupted(after=0.1)
    assert (ended.status, ended.printed, ended.errors) == (130, "cleaned\n", "")


SYNCING = """
import hashlib, sys
from jx_neuron.cli.app import run
from jx_neuron.artifact import writing
def sync(path):
    if "weights" in path.parts:
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
writing.sync = sync
interrupts.leave(run(sys.argv[1:]))
"""


def test_a_disk_that_takes_long_keeps_no_half_of_a_saved_model(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("compile", checkpoint, "--hlo-only", "--n-positions", 16, "-o", tmp_path / "out")
    ended = Running(INSTALLED + SYNCING, *arguments).interrupted(after=0.1)
    assert (ended.status, ended.errors) == (130, "")
    assert ended.seconds < PROMPT_SECONDS
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_does_not_break_off_the_cleaning_up() -> None:
    code = """
import time
try:
    print("begun", flush=True)
    time.sleep(20)
finally:
    print("cleaning", flush=True)
    time.sleep(0.5)
    print("cleaned", flush=True)
"""
    running = Running(INSTALLED + code)
    running.process.send_signal(signal.SIGINT)
    assert running.process.stdout.readline() == "cleaning\n"
    ended = running.interrupted()
    assert (ended.status, ended.printed, ended.errors) == (130, "cleaned\n", "")


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from jx_neuron.cli import interrupts
interrupts.install()
print("begun", flush=True)
time.sleep(0.5)
interrupts.leave(0)
"""
    assert Running(code).interrupted(after=0.1).status == 0


def test_a_compiler_that_hangs_is_ended_with_its_children(checkpoint: Path, tmp_path: Path) -> None:
    compiler = neuronx_cc.install(tmp_path / "bin")
    log = tmp_path / "log"
    log.mkdir()
    running = Running(
        COMMAND, "compile", checkpoint, "--n-positions", 16, "-o", tmp_path / "out",
        PATH=f"{compiler.parent}{os.pathsep}/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path / "cache"),
        NEURONX_CC_DOUBLE_LOG=str(log), NEURONX_CC_DOUBLE_HANG="b1", TMPDIR=str(log),
    )  # fmt: skip
    eventually(lambda: any(path.read_text() for path in log.glob("hanging-*")))
    ended = running.interrupted()
    assert (ended.status, ended.errors) == (130, "")
    assert ended.seconds < PROMPT_SECONDS
    assert not (tmp_path / "out").exists()
    eventually(lambda: not any(alive(pid) for pid in compilers(log)))
