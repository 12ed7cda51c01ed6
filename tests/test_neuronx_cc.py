"""The compiler's driver and its cache, against a strict stand-in for neuronx-cc."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from doubles import neuronx_cc as double
from jax._src.lib import xla_client

from jx_neuron.compiler import cache as compile_cache
from jx_neuron.compiler import neuronx_cc
from jx_neuron.compiler.errors import explain
from jx_neuron.compiler.options import CompilerOptions, flags
from jx_neuron.errors import CompilerError, JxNeuronError

TRN1 = CompilerOptions(target="trn1")
DEFAULTS = ["--framework=XLA", "--target=trn1", "--model-type=transformer", "--auto-cast=none"]


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


@pytest.fixture(autouse=True)
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with the stand-in, a cache, and the folder where the stand-in says what it was told."""
    for name in list(os.environ):
        if name.startswith("NEURON"):
            monkeypatch.delenv(name)
    double.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path / "cache"))
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv("NEURONX_CC_DOUBLE_LOG", str(log))
    return log


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


def test_the_programs_used_here_are_real() -> None:
    assert "tanh(" in xla_client.XlaComputation(module()).as_hlo_text()


# --- flags


@pytest.mark.parametrize(
    ("options", "user", "expected"),
    [
        (CompilerOptions(), "", DEFAULTS),
        (CompilerOptions(target="inf2", optlevel=1, auto_cast="matmult", auto_cast_type="fp16"), "",
         ["--framework=XLA", "--target=inf2", "--model-type=transformer", "--auto-cast=matmult",
          "--auto-cast-type=fp16", "--optlevel=1"]),
        (TRN1, "--model-type generic -O1", ["--framework=XLA", "--target=trn1", "--auto-cast=none",
                                            "--model-type=generic", "--optlevel=1"]),
        (CompilerOptions(optlevel=3), "--auto-cast=all -O 1", ["--framework=XLA", "--target=trn1",
                                       "--model-type=transformer", "--auto-cast=all", "--optlevel=1"]),
        (CompilerOptions(), "--target=trn2 -lnc=1", ["--framework=XLA", "--model-type=transformer",
                                                     "--auto-cast=none", "--target=trn2",
                                                     "--logical-nc-config=1"]),
        (CompilerOptions(target="trn2", logical_nc_config=2), "",
         ["--framework=XLA", "--target=trn2", "--model-type=transformer", "--auto-cast=none",
          "--logical-nc-config=2"]),
        (CompilerOptions(logical_nc_config=1), "", DEFAULTS),
        (TRN1, "--enable-saturate-infinity --tensorizer-options='--dump-after-all=x y'",
         [*DEFAULTS, "--enable-saturate-infinity", "--tensorizer-options=--dump-after-all=x y"]),
    ],
)  # fmt: skip
def test_flags(options: CompilerOptions, user: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", user)
    assert flags(options) == expected


def test_the_runtime_says_how_large_a_logical_core_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    assert "--logical-nc-config=1" in flags(CompilerOptions(target="trn2"))
    assert flags(TRN1) == DEFAULTS
    with pytest.raises(CompilerError, match="NEURON_LOGICAL_NC_CONFIG is 1"):
        flags(CompilerOptions(target="trn2", logical_nc_config=2))


@pytest.mark.parametrize(
    ("options", "user", "reason"),
    [
        (TRN1, "--target trn2", "asks for --target=trn2, but the programs are for trn1"),
        (TRN1, "--output=mine.neff", "sets --output"),
        (TRN1, "--logfile mine.txt", "NEURONX_DUMP_TO"),
        (TRN1, "--auto-cast", "without a value"),
        (TRN1, "--model-type='generic", "no command line"),
        (TRN1, "--lnc=2", "NCC_EARG001"),
        (CompilerOptions(target="inf2", logical_nc_config=2), "", "NCC_EARG001"),
        (CompilerOptions(target="trn2", logical_nc_config=2), "-lnc 1", "do not agree"),
    ],
)
def test_contradictory_flags_are_refused(
    options: CompilerOptions, user: str, reason: str, monkeypatch: pytest.MonkeyPatch, told: Path
) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", user)
    with pytest.raises(CompilerError, match=reason):
        neuronx_cc.compile_programs({"step": module()}, options)
    assert double.invocations(told) == []


@pytest.mark.parametrize(
    "field",
    [{"target": "trn9"}, {"optlevel": 4}, {"auto_cast": "some"}, {"compilation_worker_count": 0},
     {"model_type": "rnn"}, {"auto_cast_type": "int8"}, {"logical_nc_config": 3}],
)  # fmt: skip
def test_options_that_do_not_exist_are_refused(field: dict[str, int]) -> None:
    with pytest.raises(JxNeuronError, match=str(next(iter(field.values())))):
        CompilerOptions(**field)


def test_the_command(tmp_path: Path) -> None:
    compiler = neuronx_cc.find_compiler()
    assert compiler == neuronx_cc.Compiler(tmp_path / "bin" / "neuronx-cc", "2.21.18209.0+043b1bf7")
    line = neuronx_cc.command(compiler, tmp_path / "a.hlo.pb", tmp_path / "a.neff", TRN1)
    assert line == [
        str(compiler.path), "compile", str(tmp_path / "a.hlo.pb"), *DEFAULTS,
        f"--output={tmp_path / 'a.neff'}", f"--logfile={tmp_path / 'log-neuron-cc.txt'}",
    ]  # fmt: skip


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    assert neuronx_cc.worker_count(TRN1) == 8
    monkeypatch.setenv("NEURON_COMPILATION_WORKER_COUNT", "5")
    assert neuronx_cc.worker_count(TRN1) == 5
    assert neuronx_cc.worker_count(CompilerOptions(compilation_worker_count=3)) == 3
    assert neuronx_cc.worker_count(CompilerOptions(compilation_worker_count=3), jobs=2) == 2
    with pytest.raises(CompilerError, match="at least 1"):
        neuronx_cc.worker_count(TRN1, jobs=0)
    monkeypatch.setenv("NEURON_COMPILATION_WORKER_COUNT", "many")
    with pytest.raises(CompilerError, match="many is not a number"):
        neuronx_cc.worker_count(TRN1)


# --- the compiler itself


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(CompilerError, match=r"neuronx-cc .*pip\.repos\.neuron\.amazonaws\.com") as error:
        compiled("step")
    assert "--hlo-only" in str(error.value)


def test_a_compiler_in_the_interpreters_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert neuronx_cc.find_compiler().path == tmp_path / "bin" / "neuronx-cc"


def test_a_compiler_without_a_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bin" / "neuronx-cc").write_text("#!/bin/sh\necho no backend >&2\nexit 3\n")
    with pytest.raises(CompilerError, match="no backend"):
        neuronx_cc.find_compiler()


def test_a_program_is_compiled_with_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", "--enable-fast-loading-neuron-binaries")
    programs = {"b": module("b"), "a": module("a", "negate")}
    neffs = neuronx_cc.compile_programs(programs, CompilerOptions(target="trn2", optlevel=1))
    assert list(neffs) == ["b", "a"]
    for name, hlo in programs.items():
        flags, kept = double.read_neff(neffs[name])
        assert kept == hlo
        assert (flags["target"], flags["optlevel"], flags["auto_cast"]) == ("trn2", 1, "none")
        assert flags["enable_fast_loading_neuron_binaries"] is True


def test_programs_compile_at_the_same_time(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_MEET", "3")
    programs = {name: module(name) for name in "abc"}
    assert list(neuronx_cc.compile_programs(programs, TRN1, jobs=3)) == ["a", "b", "c"]
    assert sorted(entry["module"] for entry in double.invocations(told)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("hlo", "reason"),
    [
        (b"garbage", "no HloModuleProto"),
        (module()[:-10], "NCC_EVRF064"),
        (module(root=2**32 + 2), "INT_MAX"),
        (module("step", "partition-id"), "NCC_EVRF001"),
        (module("step", "all-reduce"), "replica groups"),
        (module("step", "all-reduce", 2, (26, 1), (49, message((1, 0)))), "channel id"),
        (module("step", "custom-call", 2, (28, b"TopK")), "NCC_EVRF015"),
    ],
)
def test_the_stand_in_is_strict(hlo: bytes, reason: str) -> None:
    with pytest.raises(CompilerError, match=reason):
        neuronx_cc.compile_programs({"step": hlo}, TRN1)


def test_flags_unknown_to_the_compiler_are_shown_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", "--fast-math=none")
    with pytest.raises(CompilerError, match="unrecognized arguments: --fast-math=none"):
        compiled("step")


def test_a_failing_program_names_the_code_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_FAIL", "EOOM001:decode")
    with pytest.raises(CompilerError) as error:
        compiled("context", "decode")
    text = str(error.value)
    assert "2.21.18209.0+043b1bf7 could not compile the program 'decode' for trn1: NCC_EOOM001" in text
    assert "more device memory than a core has. Remedy: use a larger tp degree" in text
    assert "[NCC_EOOM001] decode cannot be compiled" in text
    (log,) = (tmp_path / "cache").rglob("*.log")
    assert f"({log})" in text
    assert "INFO: Compiling decode for trn1" in log.read_text()
    monkeypatch.delenv("NEURONX_CC_DOUBLE_FAIL")
    assert double.read_neff(compiled("decode")["decode"])[1] == module("decode")


def test_one_failure_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_MEET", "2")
    monkeypatch.setenv("NEURONX_CC_DOUBLE_FAIL", "EVRF013:wrong")
    monkeypatch.setenv("NEURONX_CC_DOUBLE_HANG", "slow")
    with pytest.raises(CompilerError, match="NCC_EVRF013"):
        neuronx_cc.compile_programs({n: module(n) for n in ("slow", "wrong", "next")}, TRN1, jobs=2)
    assert sorted(entry["module"] for entry in double.invocations(told)) == ["slow", "wrong"]
    eventually(lambda: not any(alive(pid) for pid in compilers(told)))
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [
        ("x\n[ERROR] [NCC_EBVF030] too long", 70, "NCC_EBVF030: the program becomes more instructions"),
        ("NCC_EXTP004", 1, "smaller context buckets"),
        ("NCC_EVRF004: complex64", 70, "NCC_EVRF004: .*complex.*jx-neuron check"),
        ("NCC_EZZZ999", 70, r"NCC_EZZZ999\. See https://.*/EZZZ999\.html"),
        ("[F137] neuronx-cc was forcibly killed", 1, r"F137: the compiler was killed.*--jobs 1"),
        ("[F134] abnormally; NCC_EOOM002", 1, "NCC_EOOM002"),
        ("", -9, "ran out of memory.*SIGKILL.*--jobs 1"),
        ("", -15, "SIGTERM"),
        ("", 0, "wrote no NEFF"),
        ("Segmentation fault", 3, "status 3"),
    ],
)
def test_explanations(log: str, status: int, said: str) -> None:
    assert re.search(said, explain(log, status))


def test_a_compiler_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bin" / "neuronx-cc").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "NeuronX Compiler version 1.0"\nexit 0\n'
    )
    with pytest.raises(CompilerError, match="wrote no NEFF"):
        compiled("step")
    assert cached(tmp_path) == []


def test_a_compiler_killed_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_HANG", "step")
    seen: list[BaseException] = []

    def run() -> None:
        try:
            compiled("step")
        except CompilerError as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: any(path.read_text() for path in told.glob("hanging-*")))
    os.kill(double.invocations(told)[0]["pid"], signal.SIGKILL)
    thread.join(60)
    assert "SIGKILL" in str(seen[0])
    eventually(lambda: not any(alive(pid) for pid in compilers(told)))
    assert cached(tmp_path) == []
    monkeypatch.delenv("NEURONX_CC_DOUBLE_HANG")
    assert double.read_neff(compiled("step")["step"])[1] == module("step")


def test_ctrl_c_stops_the_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_HANG", "step")
    running = process(tmp_path, "locking")
    eventually(lambda: any(path.read_text() for path in told.glob("hanging-*")))
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "KeyboardInterrupt" in errors
    eventually(lambda: not any(alive(pid) for pid in compilers(told)))
    assert cached(tmp_path) == []


def test_being_killed_half_way_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path
) -> None:
    monkeypatch.setenv("NEURONX_CC_DOUBLE_HANG", "step")
    running = process(tmp_path, "locking")
    eventually(lambda: any(path.read_text() for path in told.glob("hanging-*")))
    running.kill()
    running.communicate(timeout=60)
    for pid in compilers(told):
        os.kill(pid, signal.SIGKILL)
    assert cached(tmp_path) == []
    monkeypatch.delenv("NEURONX_CC_DOUBLE_HANG")
    assert double.read_neff(compiled("step")["step"])[1] == module("step")
    assert len(double.invocations(told)) == 2


# --- the cache


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


# --- NEURONX_DUMP_TO


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
