"""What is replaced is there whole, whoever else replaces it, reads it or dies; what the disk refuses is an error."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from jx_neuron import artifact
from jx_neuron.artifact import Settings
from jx_neuron.compiler import cache as compile_cache
from jx_neuron.errors import ArtifactError
from jx_neuron.lowering import ProgramSpec, TensorSpec
from jx_neuron.step.buckets import Buckets
from jx_neuron.util import durable


def save(folder: Path, content: str) -> Path:
    """An artifact whose every file says `content`."""
    weight = TensorSpec("w", "param", (64,), "float32", (None,))
    return artifact.write(
        folder,
        settings=Settings(content, 2, "f32", (1,), Buckets((8,), (8,)), 1, all_logits=False, vocab_size=8),
        config={},
        programs=[ProgramSpec("step", {"tp": 2}, (weight,), ())],
        hlo=lambda name: content.encode() * 1000,
        parameters={"w": [np.full(64, ord(content) + rank, np.float32) for rank in (0, 1)]},
        extra_files={f"{content}.txt": content.encode()},
    )


def content_of(folder: Path) -> str:
    """What the artifact says, once all of it says the same."""
    found = artifact.read(folder)
    content = found.manifest.settings.model_type
    assert found.hlo("step") == content.encode() * 1000
    assert found.file(f"{content}.txt") == content.encode()
    for rank in (0, 1):
        np.testing.assert_array_equal(found.weights(rank)["w"], np.full(64, ord(content) + rank, np.float32))
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", "A")


@pytest.mark.parametrize("reader", [artifact.is_artifact, lambda folder: content_of(folder) == "A"])
def test_killed_between_its_two_renames_the_former_is_found(reader: Callable[[Path], bool], folder: Path) -> None:
    set_aside = folder.with_name(".model.0123.old")
    folder.rename(set_aside)
    set_aside.with_suffix(".lock").touch()
    assert reader(folder)
    assert content_of(folder) == "A"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_reader_waits_for_a_living_process_between_its_two_renames(folder: Path) -> None:
    set_aside = folder.with_name(".model.0123.old")
    with FileLock(set_aside.with_suffix(".lock")):
        folder.rename(set_aside)
        child = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(0.5); os.rename({str(set_aside)!r}, {str(folder)!r})"]
        )
        assert artifact.is_artifact(folder)
        assert content_of(folder) == "A"
        assert child.wait() == 0


def test_a_reader_does_not_wait_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "PATIENCE", 0.2)
    set_aside = folder.with_name(".model.0123.old")
    with FileLock(set_aside.with_suffix(".lock")):
        folder.rename(set_aside)
        assert not artifact.is_artifact(folder)
        with pytest.raises(ArtifactError, match=r"there is no manifest\.json"):
            artifact.read(folder)


RIVAL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_durable import ArtifactError, artifact, content_of, save
folder, mine = Path(sys.argv[1]), sys.argv[3]
for _ in range(20):
    if mine == "?":
        print(artifact.read(folder).manifest.settings.model_type)
        try:
            print(content_of(folder))
        except ArtifactError as error:  # its files are read one by one
            assert any(word in str(error) for word in ("altered", "missing", "replaced", "No such file")), error
    else:
        save(folder, mine)
"""


def test_processes_that_save_to_one_folder_and_read_it(folder: Path) -> None:
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(folder), str(Path(__file__).parent), content],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for content in "BCDE?"
    ]  # fmt: skip
    outputs = [rival.communicate(timeout=240) for rival in rivals]
    assert [(rival.returncode, error) for rival, (_, error) in zip(rivals, outputs, strict=True)] == [(0, "")] * 5
    assert set(outputs[-1][0].split()) <= set("ABCDE")
    assert content_of(folder) in "BCDE"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk(folder: Path, full_disk: None) -> None:
    with pytest.raises(ArtifactError, match=f"{folder} cannot be written .*too large.*, and is as it was"):
        save(folder, "B")
    assert content_of(folder) == "A"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_compile_cache_on_a_full_disk(tmp_path: Path, full_disk: None) -> None:
    with pytest.warns(UserWarning, match=f"cannot be kept in the compile cache {tmp_path}: .*too large"):
        compile_cache.store(tmp_path, "key", b"x" * 2000)
    assert list(tmp_path.iterdir()) == []
    assert compile_cache.load(tmp_path, "key") is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{file}/below/model", "cannot be written: {file} is no folder that can"),
        ("{tmp}/" + "n" * 300, "cannot be written .File name too long"),
        ("{tmp}/" + "/".join(["long" * 20] * 80), "name too long"),
        ("~nosuchuser/model", "is no path of a folder"),
        ("{tmp}/nul\0byte", "is no path of a folder"),
        ("/proc/sys/x", "/proc/sys/x cannot be written"),
    ],
)
def test_a_folder_that_cannot_be(path: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    path, reason = (text.format(file=file, tmp=tmp_path) for text in (path, reason))
    began = time.monotonic()
    with pytest.raises(ArtifactError, match=reason):
        save(Path(path), "A")
    assert time.monotonic() - began < 5
    assert not artifact.is_artifact(path)
    with pytest.raises(ArtifactError):
        artifact.read(path)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match=f"{tmp_path} is no folder that can"):
        artifact.check_replaceable(tmp_path / "model")


def test_only_that_another_put_a_folder_there_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ArtifactError, match=f"{folder} cannot be written .Input/output error"):
        save(folder, "B")
    monkeypatch.undo()
    assert content_of(folder) == "A"
    assert list(folder.parent.iterdir()) == [folder]
