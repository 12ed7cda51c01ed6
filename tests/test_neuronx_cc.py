"""The compiler's driver against a strict stand-in for neuronx-cc."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import compiling
import pytest
from compiling import TRN1, alive, cached, compiled, compilers, eventually, message, module, process
from doubles import neuronx_cc as double
from jax._src.lib import xla_client

from jx_neuron.compiler import neuronx_cc
from jx_neuron.compiler.errors import explain
from jx_neuron.compiler.options import CompilerOptions, flags
from jx_neuron.errors import CompilerError, JxNeuronError

DEFAULTS = ["--framework=XLA", "--target=trn1", "--model-type=transformer", "--auto-cast=none"]
log, told = compiling.log, compiling.told
pytestmark = pytest.mark.usefixtures("told")


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
