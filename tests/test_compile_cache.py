"""The compiler's cache and its dumps, against a strict stand-in for neuronx-cc."""

import shlex
import sys
import time
from pathlib import Path

import compiling
import pytest
from compiling import TRN1, cached, compiled, eventually, module, process
from doubles import neuronx_cc as double

from jx_neuron.compiler import cache as compile_cache
from jx_neuron.compiler import neuronx_cc
from jx_neuron.compiler.options import CompilerOptions
from jx_neuron.errors import CompilerError

log, told = compiling.log, compiling.told
pytestmark = pytest.mark.usefixtures("told")


def test_what_was_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1 --enable-saturate-infinity")
    first = compiled("step")
    assert compiled("step") == first
    monkeypatch.setenv("NEURON_CC_FLAGS", "--optlevel 1 --verbose=debug --enable-saturate-infinity")
    assert compiled("step") == first
    assert len(double.invocations(told)) == 1


def test_program_flags_target_and_compiler_each_make_a_new_compilation(
    monkeypatch: pytest.MonkeyPatch, told: Path
) -> None:
    compiled("step")
    neuronx_cc.compile_programs({"step": module(opcode="negate")}, TRN1)
    neuronx_cc.compile_programs({"step": module("step")}, CompilerOptions(target="trn1n"))
    neuronx_cc.compile_programs({"step": module("step")}, CompilerOptions(optlevel=1))
    monkeypatch.setenv("NEURONX_CC_DOUBLE_VERSION", "2.22.0.0")
    compiled("step")
    assert len(double.invocations(told)) == 5


def test_equal_programs_are_compiled_once(told: Path) -> None:
    neffs = neuronx_cc.compile_programs({"a": module(), "b": module()}, TRN1, jobs=2)
    assert neffs["a"] == neffs["b"]
    assert len(double.invocations(told)) == 1


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_corrupted_entry_is_compiled_again(harm: str, tmp_path: Path, told: Path) -> None:
    neff = compiled("step")
    (entry,) = cached(tmp_path)
    data = entry.read_bytes()
    entry.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[: len(data) // 2], "empty": b""}[harm])
    half = entry.with_name(f".{entry.stem}-0123.tmp")
    half.write_bytes(data[:5])
    assert compiled("step") == neff
    assert len(double.invocations(told)) == 2
    assert cached(tmp_path) == [entry]
    assert entry.read_bytes() == data
    assert not half.exists()


def test_two_processes_compile_a_program_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_WAIT", str(tmp_path / "gate"))
    first = process(tmp_path, "first")
    eventually(lambda: double.invocations(told))
    second = process(tmp_path, "second")
    eventually((tmp_path / "second").exists)
    time.sleep(0.5)
    assert len(double.invocations(told)) == 1
    (tmp_path / "gate").touch()
    assert [p.communicate(timeout=60)[0].strip() for p in (first, second)] == [
        str(len(cached(tmp_path)[0].read_bytes()))
    ] * 2
    assert len(double.invocations(told)) == 1


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_cache.default_folder() == tmp_path / "cache" / "jx-neuron"
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", "file:///var/tmp/neuron%20cache")
    assert compile_cache.default_folder() == Path("/var/tmp/neuron cache/jx-neuron")
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", "s3://bucket/cache")
    with pytest.raises(CompilerError, match="local folders only"):
        compiled("step")
    monkeypatch.delenv("NEURON_COMPILE_CACHE_URL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert compile_cache.default_folder() == tmp_path / "xdg" / "jx-neuron" / "neff"
    neuronx_cc.compile_programs({"step": module()}, TRN1, cache_dir=tmp_path / "mine")
    assert len(list((tmp_path / "mine").glob("*.neff"))) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CompilerError, match=r"cannot be written.*NEURON_COMPILE_CACHE_URL"):
        neuronx_cc.compile_programs({"step": module()}, TRN1, cache_dir=tmp_path / "file" / "cache")


# NEURONX_DUMP_TO


def test_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    for run in ("compiled", "from the cache"):
        monkeypatch.setenv("NEURONX_DUMP_TO", str(tmp_path / run))
        neff = neuronx_cc.compile_programs({"decode/b1": module()}, TRN1)["decode/b1"]
        (folder,) = (tmp_path / run).iterdir()
        assert folder.name.startswith("decode_b1-")
        assert (folder / "model.hlo.pb").read_bytes() == module()
        assert (folder / "model.neff").read_bytes() == neff
        line = shlex.split((folder / "command.txt").read_text())
        assert line[1:3] == ["compile", str(folder / "model.hlo.pb")]
    assert len(double.invocations(told)) == 1
    (folder,) = (tmp_path / "compiled").iterdir()
    assert (folder / "output.txt").read_text() == "Compiler status PASS\n"
    assert "Compiling step" in (folder / "log-neuron-cc.txt").read_text()


def test_the_dump_of_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONX_DUMP_TO", str(tmp_path / "dump"))
    monkeypatch.setenv("NEURONX_CC_DOUBLE_FAIL", "EVRF064")
    with pytest.raises(CompilerError) as error:
        compiled("step")
    (folder,) = (tmp_path / "dump").iterdir()
    assert str(folder / "output.txt") in str(error.value)
    assert {path.name for path in folder.iterdir()} == {
        "model.hlo.pb", "command.txt", "output.txt", "log-neuron-cc.txt",
    }  # fmt: skip
    assert "NCC_EVRF064" in (folder / "output.txt").read_text()


def test_a_cache_that_cannot_keep_or_give_a_program_loses_no_compilation(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    compile_cache.store(folder, "key", b"neff")
    assert compile_cache.load(folder, "key") == b"neff"
    (entry,) = folder.iterdir()
    entry.unlink()
    entry.mkdir()  # which can neither be read nor replaced
    assert compile_cache.load(folder, "key") is None
    with pytest.warns(UserWarning, match=r"cannot be kept in the compile cache .*kept"):
        compile_cache.store(folder, "key", b"neff")
