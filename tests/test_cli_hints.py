"""Options as people guess them, and what is said to those who type another program's."""

import json
from pathlib import Path

import pytest
import tiny
from test_chat_command import TEMPLATE
from test_cli import run
from typer.main import get_command

from jx_neuron.cli.app import app

FEW = ("--max-tokens", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer(TEMPLATE))


def test_other_spellings_are_read_alike() -> None:
    sample = get_command(app).commands["sample"]

    def read(*arguments: str) -> dict[str, object]:
        return sample.make_context("sample", ["./m", "-p", "a", "--seed", "3", *arguments]).params

    usual = read("--max-tokens", "6", "--temperature", "1", "--dtype", "bf16", "--draft", "ngram")
    assert (usual["max_new_tokens"], usual["temperature"], usual["amp"]) == (6, 1.0, "bf16")
    assert read("--max-new-tokens", "6", "--temp", "1", "--amp", "bf16", "--draft", "ngram") == usual


@pytest.mark.slow
def test_other_spellings_give_the_same_answer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the cat\n")
    usual = run("sample", folder, "the cat", "--max-tokens", 6, "--temperature", 1, "--seed", 3, "--dtype", "f32")
    assert (usual.returncode, usual.stdout[:7]) == (0, "the cat"), usual.stderr
    others = ("--max-new-tokens", 6, "--temp", 1, "--seed", 3, "--amp", "float32")
    for prompt in (("-p", "the cat"), ("--prompt", "the cat"), ("--file", tmp_path / "prompt.txt"), ("--file", "-")):
        assert run("sample", folder, *prompt, *others, stdin="the cat").stdout == usual.stdout


@pytest.mark.slow
def test_prompts_of_every_kind_are_answered_in_order(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    done = run("sample", folder, "a", "-p", "b", "-p", "c", "--file", tmp_path / "lines.txt", "--json", *FEW)
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["a", "b", "c", "one\ntwo"]


@pytest.mark.slow
def test_a_system_message_comes_before_the_prompt(folder: Path) -> None:
    done = run("sample", folder, "-p", "ab", "--system", "be kind", *FEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("chat", folder, "-p", "ab", "--system", "be kind", *FEW).stdout
    plain = run("sample", folder, "-p", "[s] be kind; [u] ab; [a] ", *FEW).stdout
    assert plain == "[s] be kind; [u] ab; [a] " + done.stdout


@pytest.mark.slow
def test_turns_of_chat_are_those_that_are_typed(folder: Path) -> None:
    turns = run("chat", folder, "-p", "ab", "-p", "cd", *FEW, stdin="never read\n")
    assert turns.stdout == run("chat", folder, *FEW, stdin="ab\ncd\n").stdout


@pytest.mark.parametrize("command", ["sample", pytest.param("chat", marks=pytest.mark.slow)])
def test_an_answer_ends_before_a_stop_string(folder: Path, command: str) -> None:
    how = (command, folder, "-p", "ab", *(["--chat"] if command == "sample" else []), "--max-tokens", 12)
    answer = run(*how).stdout.removesuffix("\n")
    stop = answer[4:6]
    as_json = ["--json"] if command == "sample" else []
    text = run(*how, "--stop", "not in it", "--stop", stop, *as_json).stdout.removesuffix("\n")
    if as_json:
        stopped = json.loads(text)
        text = stopped["text"]
        assert stopped["finish_reason"] == "stop"
    assert text == answer[: answer.index(stop)]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("run", "./m"), "Type: jx-neuron chat ./m"),
        (("run", "./m", "why is it so?"), "Type: jx-neuron sample --chat ./m 'why is it so?'"),
        (("generate", "./m", "a"), "Type: jx-neuron sample ./m a"),
        (("show", "gpt2"), "Type: jx-neuron info gpt2"),
        (("list",), "Type: jx-neuron models"),
        (("pull", "gpt2"), "hf download"),
        (("help",), "Type: jx-neuron --help"),
        (("gpt2", "a b"), "the command comes first: jx-neuron sample gpt2 'a b'"),
        (("model.gguf",), "the command comes first: jx-neuron sample model.gguf"),
        (("--demo", "a"), "It comes after a command: jx-neuron sample --demo"),
        (("sampel",), "Did you mean 'sample'?"),
        (("sample", "--port", "1"), "--port goes with jx-neuron serve."),
        (("sample", "--trust-remote-code"), "No code of a checkpoint is run"),
        (("sample", "--model", "gpt2"), "Name the model right after the command"),
        (("serve", "--temp", "1"), "It belongs in requests: temperature (docs/serving.md)."),
        (("serve", "--system", "a"), "It belongs in requests: a system message (docs/serving.md)."),
    ],
)
def test_habits_are_told_what_to_type_here(typed: tuple[str, ...], told: str) -> None:
    done = run(*typed)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_options_are_grouped_under_one_spelling() -> None:
    text = run("sample", "--help").stdout
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Arguments:", "Prompts:", "Model:", "How tokens are chosen:", "Options:"]
    assert {"--max-tokens", "--stop"} <= set(text.partition("How tokens are chosen:")[2].split())
    assert "Run a model:\n  sample" in run("--help").stdout
