"""jx-neuron compile and check as a user runs them, and jx-neuron sample on what they wrote."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from doubles import neuronx_cc
from families import FIRST_RELEASE
from test_cli import Done, run

from jx_neuron import LlamaForSampling
from jx_neuron.artifact.manifest import neff_file, read_manifest
from jx_neuron.lowering.hlo import proto
from jx_neuron.models.known import KNOWN
from jx_neuron.runtime import neuron as runtime

SHORT = ("--n-positions", 16, "--context-length-estimate", 16)
NAMES = {"context16-b1-s16-k64", "decode-b1-s16-k64"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.saved("llama", tmp_path_factory.mktemp("llama"))
    words = {f"w{i}": i for i in range(tiny.VOCAB)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without neuronx-cc, and with nothing that names a target."""
    monkeypatch.setattr(runtime, "PRODUCT", tmp_path / "no product")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for neuronx-cc on PATH; gives where it logs."""
    monkeypatch.setenv("PATH", f"{neuronx_cc.install(tmp_path / 'bin').parent}{os.pathsep}/usr/bin:/bin")
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv("NEURONX_CC_DOUBLE_LOG", str(log))
    return log


def refused(done: Done, *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stderr.startswith("jx-neuron: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in " ".join(done.stderr.split())


def test_compiled_with_weights_it_is_all_that_sample_needs(checkpoint: Path, compiler: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compile", checkpoint, *SHORT, "--tp", 2, "--target", "inf2", "--jobs", 2, "-o", out)
    assert done.returncode == 0, done
    assert done.stderr == ""
    assert f"2 programs for inf2 in {out}" in done.stdout.replace("\n", "")
    for title in ("program", "instructions", "collectives", "HLO", "NEFF", "seconds", *NAMES):
        assert title in done.stdout
    calls = neuronx_cc.invocations(compiler)
    assert {call["module"] for call in calls} == NAMES
    assert all("--target=inf2" in call["argv"] for call in calls)
    manifest = read_manifest(out)
    assert {p.name for p in manifest.programs if neff_file(p.name) in manifest.files} == NAMES
    assert manifest.settings.target == "inf2"
    shutil.rmtree(compiler)
    answer = run("sample", out, "w5 w7", "w9", "--max-new-tokens", 6, "--json")
    assert answer.returncode == 0, answer
    straight = run("sample", checkpoint, "w5 w7", "w9", "--max-new-tokens", 6, "--n-positions", 16, "--json")
    tokens = [[json.loads(line)["tokens"] for line in of.stdout.splitlines()] for of in (answer, straight)]
    assert len(tokens[0]) == 2
    assert tokens[0] == tokens[1]


def test_json_says_what_the_table_says(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--tp", 2, "--hlo-only", "--no-weights", "--json")
    done = run("compile", checkpoint / "config.json", *SHORT, *how, "-o", out)
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert (told["directory"], told["target"], told["tp_degree"]) == (str(out), "trn1", 2)
    assert {row["name"] for row in told["programs"]} == NAMES
    for row in told["programs"]:
        path = out / "hlo" / f"{row['name']}.pb"
        module = proto.parse(path.read_bytes())
        assert row["instructions"] == len(proto.entry(module).instructions)
        assert row["collectives"] == sum(i.opcode in proto.COLLECTIVES for i in proto.instructions(module)) > 4
        assert row["hlo_bytes"] == path.stat().st_size
        assert row["neff_bytes"] is None
        assert 0 < row["seconds"] < told["seconds"]
    assert not read_manifest(out).weights
    model = LlamaForSampling.from_pretrained(
        checkpoint, n_positions=16, context_length_estimate=16, tp_degree=2, backend="host"
    ).load(out)
    ids = tiny.prompts(1, 5)
    np.testing.assert_array_equal(model.sample(ids, 12, top_k=1), tiny.greedy(tiny.model("llama"), ids, 12))


@pytest.mark.parametrize("asked", ["facebook/opt-125m", "openai-community/gpt2", "GPT2"])
def test_known_names_need_no_network_and_no_weights(asked: str, tmp_path: Path) -> None:
    done = run("compile", asked, *SHORT, "--amp", "bf16", "--hlo-only", "--no-weights", "-o", tmp_path / "out")
    assert done.returncode == 0, done
    manifest = read_manifest(tmp_path / "out")
    assert manifest.config["model_type"] == ("opt" if "opt" in asked else "gpt2")
    decode = next(p for p in manifest.programs if p.name == "decode-b1-s16-k64")
    assert {t.dtype for t in decode.inputs if t.kind in ("param", "state") and t.name != "state.token"} == {"bfloat16"}


def test_without_weights_at_hand_it_says_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    for model in ("facebook/opt-125m", checkpoint / "config.json"):
        refused(
            run("compile", model, "--hlo-only", "-o", tmp_path / "out"),
            "To compile from the config alone, add --no-weights",
        )
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_it_says_so_before_any_work(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("jx_neuron.runtime.deployment.lower", None)
    done = run("compile", checkpoint, "-o", tmp_path / "out")
    refused(
        done,
        "neuronx-cc, AWS's compiler, is not installed",
        "pip install neuronx-cc torch-neuronx --extra-index-url https://pip.repos.neuron.amazonaws.com",
        "--hlo-only",
    )
    assert not (tmp_path / "out").exists()


def test_what_neuron_refuses_is_named_and_nothing_is_written(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    from jx_neuron.lowering.legalize import passes

    monkeypatch.setattr(passes, "TOP_K", "AwsNeuronTopX")
    done = run("compile", checkpoint, *SHORT, "--hlo-only", "--no-weights", "--target", "trn2", "-o", tmp_path / "out")
    refused(done, "would refuse the model for trn2", "context16-b1-s16-k64", "NCC_EVRF015", "AwsNeuronTopX", "Instead:")
    assert not (tmp_path / "out").exists()


def test_a_program_that_fails_to_compile_leaves_nothing(checkpoint: Path, compiler: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NEURONX_CC_DOUBLE_FAIL", "EBVF030:context16")
    done = run("compile", checkpoint, *SHORT, "--no-weights", "-o", tmp_path / "out")
    refused(done, "could not compile the program 'context16-b1-s16-k64'", "NCC_EBVF030")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "trn9"], ["unknown target 'trn9'; choose one of inf2, trn1"]),
        (["--dtype", "f8"], ["dtype 'f8' is not supported"]),
        (["--n-positions", 16, "--context-length-estimate", 32], ["context_length_estimate=32 exceeds n_positions=16"]),
    ],
)
def test_bad_options_are_refused(arguments: list, words: list, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run("compile", checkpoint / "config.json", *arguments, "--hlo-only", "--no-weights", "-o", out), *words)
    assert not out.exists()


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    arguments = ("--n-positions", 4096, "--hlo-only", "--no-weights", "-o", tmp_path / "out")
    refused(run("compile", "facebook/opt-30b", *arguments), "n_positions=4096 exceeds the 2048 positions")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    done = run("compile", checkpoint, *SHORT, "--hlo-only", "--no-weights", "-o", tmp_path)
    refused(done, "holds no artifact to replace")
    assert (tmp_path / "thesis.txt").read_text() == "years"


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    done = run("compile", checkpoint, *SHORT, "--tp", 2, "--hlo-only", "--no-weights", "-o", out)
    assert done.returncode == 0, done
    return out


@pytest.mark.parametrize("target", ["inf2", "trn1", "trn1n", "trn2", "trn3"])
def test_check_passes(target: str, artifact: Path) -> None:
    done = run("check", artifact, "--target", target)
    assert done.returncode == 0, done
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: passes on {target}" for name in NAMES)


def test_check_names_what_is_wrong_and_ends_with_1(artifact: Path, tmp_path: Path) -> None:
    hlo = (artifact / "hlo" / "decode-b1-s16-k64.pb").read_bytes()
    path = tmp_path / "bad.pb"
    path.write_bytes(hlo.replace(b"AwsNeuronTopK", b"AwsNeuronTopX"))
    done = run("check", path, "--target", "trn1")
    assert done.returncode == 1
    assert done.stdout.startswith("bad.pb:\n  error NCC_EVRF015")
    told = json.loads(run("check", path, "--target", "trn1", "--json").stdout)
    assert told["target"] == "trn1"
    assert told["passes"] is False
    (violation, *_) = told["programs"]["bad.pb"]
    assert violation["code"] == "EVRF015"
    assert violation["instruction"] in done.stdout
    path.write_bytes(hlo)
    assert run("check", path).stdout == "bad.pb: passes on trn1\n"
    assert run("check", path, "--target", "inf2", "--lnc", 2).returncode == 1
    assert run("check", path, "--target", "trn2", "--lnc", 2).returncode == 0


def test_check_refuses_what_is_no_program(artifact: Path, tmp_path: Path) -> None:
    refused(run("check", tmp_path / "nothing"), "no such folder or file")
    refused(run("check", tmp_path), "there is no manifest.json")
    (tmp_path / "noise.pb").write_bytes(b"\xff\xfe not a module")
    refused(run("check", tmp_path / "noise.pb"), "noise.pb: not a serialized HloModuleProto")
    copy = shutil.copytree(artifact, tmp_path / "copy")
    path = copy / "hlo" / "decode-b1-s16-k64.pb"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    refused(run("check", copy), "decode-b1-s16-k64.pb was altered")


DEGREES = {"EleutherAI/gpt-j-6B": 8, "gpt2-large": 4, "gpt2-xl": 1, "facebook/opt-30b": 8, "facebook/opt-13b": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_RELEASE)
def test_the_eleven_checkpoints_of_the_first_release_pass_everywhere(name: str, tmp_path: Path) -> None:
    out, tp = tmp_path / "out", DEGREES.get(name, 2)
    done = run("compile", name, "--tp", tp, "--amp", "f16", "--hlo-only", "--no-weights", "-o", out)
    assert done.returncode == 0, done
    for target in ("inf2", "trn1", "trn2"):
        checked = run("check", out, "--target", target, "--json")
        assert checked.returncode == 0, checked.stdout
        told = json.loads(checked.stdout)
        assert len(told["programs"]) == (9 if "gpt2" in name else 11)
        assert not any(told["programs"].values())


FULL_SIZES = """Qwen/Qwen3-32B google/gemma-3-27b-it mistralai/Mistral-Small-24B-Instruct-2501 microsoft/phi-4
tiiuae/falcon-40b bigscience/bloom""".split()
LOWERED = [(name, tp) for name in FULL_SIZES for tp in (8, 32) if (name, tp) != ("bigscience/bloom", 8)]  # too large


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp"), LOWERED)
def test_full_sizes_lower_in_a_minute_and_two_gigabytes(name: str, tp: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jx_neuron", "compile", name, "--tp", str(tp), "--amp", "bf16", "--hlo-only"]
    used = measured([*command, "--no-weights", "-o", str(out)], cwd=Path(__file__).parent.parent)
    assert used.bytes < 2e9
    assert used.cpu_seconds < 2 * 60  # of two processes, one that traces and one that partitions
    for target in ("inf2", "trn1", "trn2"):
        assert not any(json.loads(run("check", out, "--target", target, "--json").stdout)["programs"].values())


def test_a_full_size_with_few_layers_lowers(tmp_path: Path) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(KNOWN["tiiuae/falcon-40b"] | {"num_hidden_layers": 2}))
    lengths = ("--n-positions", 128, "--context-length-estimate", 64)
    done = run("compile", config, "--tp", 32, "--amp", "bf16", "--hlo-only", "--no-weights", "-o", out, *lengths)
    assert done.returncode == 0, done
    for target in ("inf2", "trn1", "trn2"):
        assert not any(json.loads(run("check", out, "--target", target, "--json").stdout)["programs"].values())


@dataclass(frozen=True)
class Used:
    """What a command and its children used: `bytes` of memory at most at a time, shared pages divided."""

    bytes: int
    cpu_seconds: float


def measured(command: list[str], cwd: Path) -> Used:
    before, most = resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None:
            most = max(most, sum(map(proportional, session(process.pid))))
            time.sleep(0.1)
    assert process.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Used(most, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def session(leader: int) -> list[Path]:
    """The processes in /proc of a session."""

    def is_in(path: Path) -> bool:
        with suppress(OSError):
            return int((path / "stat").read_text().rpartition(")")[2].split()[3]) == leader
        return False

    return [path for path in Path("/proc").glob("[0-9]*") if is_in(path)]


def proportional(process: Path) -> int:
    with suppress(OSError):
        lines = (process / "smaps_rollup").read_text().splitlines()
        return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return 0
