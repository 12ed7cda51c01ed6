"""jx-neuron sample as a user runs it: a process, its output, and its exit status."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jx_neuron.cli.app import run as run_here

WORDS = ["<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, stdin: str | bytes = "") -> Done:
    """The command line in this process: each of its own would spend seconds importing."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin))
        ),
        mock.patch.dict(os.environ, HF_HUB_OFFLINE="1", COLUMNS="80"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = run_here([str(argument) for argument in arguments])
    return Done(status, out.getvalue(), err.getvalue())


def test_as_a_process_of_its_own(folder: Path) -> None:
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jx_neuron", *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    good = process("sample", str(folder), "the cat", "--max-new-tokens", "6")
    assert good.returncode == 0, good.stderr
    assert good.stdout == run("sample", folder, "the cat", "--max-new-tokens", 6).stdout
    bad = process("sample", str(folder), "the cat", "--amp", "f8")
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert bad.stdout == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=len(WORDS), n_positions=48, eos_token_id=1, bos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(path)
    return path


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_text_and_timings(folder: Path) -> None:
    done = run("sample", folder, "the cat", "--max-new-tokens", 6)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    assert len(done.stdout.split()) >= 3
    assert set(done.stdout.split()) <= set(WORDS)
    assert "tokens/s" in done.stderr
    assert "first token after" in done.stderr


def test_json_a_prompt_a_line_whatever_the_batch(folder: Path) -> None:
    prompts = "the cat\na dog ran on the mat\nsat\n"
    alone = run("sample", folder, "--json", "--max-new-tokens", 8, stdin=prompts)
    assert alone.returncode == 0, alone.stderr
    answers = [json.loads(line) for line in alone.stdout.splitlines()]
    assert [a["prompt"] for a in answers] == prompts.splitlines()
    assert [a["prompt_tokens"] for a in answers] == [2, 6, 1]
    for answer in answers:
        ended = 1 in answer["tokens"]
        assert answer["finish_reason"] == ("stop" if ended else "length")
        assert len(answer["tokens"]) == 8 or ended
    together = run("sample", folder, "--json", "--max-new-tokens", 8, "--batch-size", 2, stdin=prompts)
    assert [json.loads(line)["tokens"] for line in together.stdout.splitlines()] == [a["tokens"] for a in answers]


def test_a_seed_repeats_itself(folder: Path) -> None:
    how = ("--json", "--max-new-tokens", 20, "--temperature", 2, "--top-k", 9)
    sampled = [run("sample", folder, "the cat", *how, "--seed", seed) for seed in (1, 1, 2)]
    tokens = [json.loads(done.stdout)["tokens"] for done in sampled]
    assert tokens[0] == tokens[1] != tokens[2]


def edit(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def without(path: Path, name: str) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def with_tensor(path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = np.ones(shape, np.float32)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "safetensors"),
        (cut, "model.safetensors"),
        (lambda p: without(p, "transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias"),
        (lambda p: with_tensor(p, "transformer.h.9.novel.weight", (2,)), "transformer.h.9.novel.weight"),
        (lambda p: with_tensor(p, "transformer.wpe.weight", (3, 32)), "transformer.wpe.weight has shape [3, 32]"),
        (lambda p: with_tensor(p, "lm_head.weight", (len(WORDS), 32)), "lm_head.weight differs"),
        (lambda p: edit(p, model_type="mamba"), "'mamba' is not supported"),
        (lambda p: edit(p, activation_function="prelu"), "activation_function='prelu'"),
        (lambda p: edit(p, add_cross_attention=True), "add_cross_attention=True"),
        (lambda p: edit(p, sliding_window=4), "sliding_window=4 is not supported"),
        (lambda p: edit(p, n_head=3), "n_head=3"),
        (lambda p: edit(p, quantization_config={"bits": 4}), "quantization_config"),
    ],
)
def test_a_spoilt_checkpoint_is_one_message_and_status_2(folder: Path, tmp_path: Path, spoil, message: str) -> None:
    path = copy(folder, tmp_path / "spoilt")
    spoil(path)
    done = run("sample", path, "the cat", "--max-new-tokens", 4)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder", "hi"], "no/such/folder"),
        ([], "no model"),
        (["{folder}", "the cat", "--max-new-tokens", "48"], "--n-positions"),
        (["{folder}", "the cat", "--n-positions", "4096"], "48 positions"),
        (["{folder}", "the cat", "--amp", "int8"], "f32, f16, bf16"),
        (["{folder}", "the cat", "--top-p", "1.5", "--max-new-tokens", "4"], "top_p=1.5"),
        (["{folder}", "the cat", "--chat"], "no chat template"),
        (["{folder}"], "no prompt"),
        (["{folder}", "the cat", "--batch-size", "0"], "batch-size"),
    ],
)
def test_bad_arguments_are_one_message_and_status_2(folder: Path, arguments: list[str], message: str) -> None:
    done = run("sample", *(a.format(folder=folder) for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tokenizer", [True, False])
def test_token_ids_for_prompts(folder: Path, tmp_path: Path, tokenizer: bool) -> None:
    path = copy(folder, tmp_path / "model")
    how = ("--max-new-tokens", 4, "--json")
    texts = [json.loads(line) for line in run("sample", path, "the cat", "a dog ran", *how).stdout.splitlines()]
    if not tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink()
    done = run("sample", path, "--ids", "2,3", "--ids", "6 8, 9", *how)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["2,3", "6 8, 9"]
    for answer, text in zip(answers, texts, strict=True):
        assert (answer["tokens"], answer["prompt_tokens"]) == (text["tokens"], text["prompt_tokens"])
        assert answer["text"] == (text["text"] if tokenizer else "")
    first, second = (",".join(map(str, answer["tokens"])) for answer in answers)
    shown = run("sample", path, "--ids", "2, 3", "--max-new-tokens", 4)
    together = run("sample", path, "--ids", "2 3", "--ids", "6,8,9", "--max-new-tokens", 4, "--batch-size", 2)
    if tokenizer:
        assert shown.stdout == run("sample", path, "the cat", "--max-new-tokens", 4).stdout
    else:
        assert shown.stdout == f"2,3,{first}\n"
        assert together.stdout == f"2,3,{first}\n\n6,8,9,{second}\n\n"
        refused = run("sample", path, "the cat")
        assert refused.returncode == 2
        assert "--ids 1,2,3" in refused.stderr


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["", "--ids", "2"], "--ids '' is not legal"),
        (["2,x"], "it takes token ids, such as 1,2,3"),
        (["-1"], "--ids '-1' is not legal"),
        (["2,10"], "ids of this vocabulary are 0 to 9"),
        (["2", "--ids", "1" * 40], "ids of this vocabulary are 0 to 9"),
        (["2", "--chat"], "--chat takes text"),
    ],
)
def test_ids_that_are_none(folder: Path, ids: list[str], message: str) -> None:
    done = run("sample", folder, "--ids", *ids, "--max-new-tokens", 4)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_all_is_checked_before_anything_is_printed(folder: Path) -> None:
    for wrong in (("--top-p", 3), ("--top-p", 0), ("--max-new-tokens", 47)):
        done = run("sample", folder, "the cat", "--max-new-tokens", 4, *wrong)
        assert (done.returncode, done.stdout) == (2, ""), done


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("sample", "--tempe"), "--temperature"),
        (("sample", "--max"), "--max-tokens"),
        (("sample", "--topk"), "--top-k or --stop"),
        (("sample", "--n-position"), "--n-positions"),
        (("compile", "--batchsize"), "--batch-size"),
        (("plan", "--context"), "--context-length-estimate"),
        (("plan", "--hepl"), "--help"),
        (("sample", "--max-new-token"), "--max-tokens"),
        (("sample", "--max_new_tokenz"), "--max-tokens"),
        (("sample", "--tensor-parallel-size"), "--tp"),
        (("serve", "--max-model-len"), "--n-positions"),
        (("chat", "--lora-modules"), "--adapter"),
    ],
)
def test_an_option_that_there_is_not_is_told_which_was_meant(typed: tuple[str, str], meant: str) -> None:
    done = run(*typed)
    assert done.returncode == 2
    assert done.stderr.endswith(f"Error: No such option: {typed[1]}. Did you mean {meant}?\n")


def test_an_option_like_no_other_is_only_named() -> None:
    assert run("sample", "--frobnicate").stderr.endswith("Error: No such option: --frobnicate\n")


def test_help_names_every_command_and_option() -> None:
    assert "sample" in run("--help").stdout
    text = run("sample", "--help").stdout
    assert "--max-new-tokens" not in text
    assert "--temp " not in text
    for option in ("--demo", "--chat", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--json"):
        assert option in text
