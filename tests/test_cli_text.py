"""What the command line reads and writes: odd text, names and streams end in one message and status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from test_cli import Done, run

ROOT = Path(__file__).parent.parent
FEW = ("--max-new-tokens", 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer())


def refused(done: Done, *words: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


# what is read


@pytest.mark.parametrize("text", ["ab\r\ncd\r\n", "ab\ncd", "\ufeffab\r\ncd\r\n\r\n", "\n  \nab\n\ncd\n"])
def test_lines_end_as_on_any_system(checkpoint: Path, text: str) -> None:
    alone = run("sample", checkpoint, "ab", "cd", "--json", *FEW).stdout
    lines = run("sample", checkpoint, "--json", *FEW, stdin=text.encode()).stdout
    pick = ("prompt", "tokens", "text", "prompt_tokens")
    answers = [
        [{key: answer[key] for key in pick} for answer in map(json.loads, of.splitlines())] for of in (alone, lines)
    ]
    assert answers[0] == answers[1]
    assert [answer["prompt"] for answer in answers[1]] == ["ab", "cd"]


def test_a_line_that_is_not_utf_8_is_named(checkpoint: Path) -> None:
    refused(run("sample", checkpoint, stdin=b"fine\nna\xefve\n"), "line 2 of standard input is not UTF-8 text")


@pytest.mark.parametrize("argument", ["\udcff", "a\0b"])
@pytest.mark.parametrize("command", ["sample", "compile", "check", "plan", "bench"])
def test_arguments_that_are_no_text(command: str, argument: str) -> None:
    refused(run(command, "model", argument), "argument 3")


LONG, DEEP = "n" * 300, "/".join(["d" * 49] * 120)


@pytest.mark.parametrize("command", ["sample", "compile", "check", "plan", "bench"])
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("/dev/null", "/dev/null"),
        ("~nosuchuser/model", "no such user"),
        (LONG, "File name too long"),
        (DEEP, "File name too long"),
        (f"/{DEEP}", "File name too long"),
        ("/dev/null/model", "/dev/null/model"),
        ("", "jx-neuron: "),
    ],
)
def test_names_that_no_model_has(command: str, name: str, word: str, tmp_path: Path) -> None:
    more = ("--hlo-only", "-o", tmp_path / "out") if command == "compile" else ()
    done = run(command, name, *more)
    refused(done, word)
    assert len(done.stderr) < 400


@pytest.mark.parametrize("name", ["/dev/null", "/dev/null/x", "~nosuchuser/x", LONG, DEEP, "o" * 250])
def test_folders_that_cannot_be_written(name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    sizes = ("--n-positions", 16, "--context-length-estimate", 16)
    refused(run("compile", checkpoint, *sizes, "--hlo-only", "--no-weights", "-o", name))


@pytest.mark.parametrize("name", ["/dev/null", "/dev/null/x.png", "~nosuchuser/x.png", f"{LONG}.png", f"{DEEP}.png"])
def test_pictures_that_cannot_be_written(name: str, checkpoint: Path) -> None:
    refused(run("plan", checkpoint, "--plot", name))


# chat templates


def templated(folder: Path, template: str | dict[str, str], tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).unlink()
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('only even turns') }}", "only even turns"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ({"tool_use": "{{ messages }}", "rag": "{{ messages }}"}, "no default"),
    ],
)
def test_chat_templates_that_fail(template, word: str, checkpoint: Path, tmp_path: Path) -> None:
    refused(run("sample", templated(checkpoint, template, tmp_path), "hi", "--chat", *FEW), "chat template", word)


# streams


def streams(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a shell of its own, with its standard streams as `redirection` has them."""
    command = f'exec "$@" {redirection}'
    words = [sys.executable, "-m", "jx_neuron", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", command, "bash", *words], capture_output=True, text=True, env=environment, check=False
    )


def test_a_closed_standard_input(checkpoint: Path) -> None:
    done = streams("<&-", "sample", checkpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "jx-neuron: standard input is closed; give a prompt after MODEL\n"
    assert streams("<&-", "plan", checkpoint, "--json").returncode == 0


@pytest.mark.parametrize("arguments", [("plan", "gpt2"), ("plan", "gpt2", "--json"), ("--help",), ("--version",)])
def test_a_full_or_closed_standard_output(arguments: tuple[str, ...]) -> None:
    full = streams(">/dev/full", *arguments)
    assert full.returncode == 2
    assert full.stderr == "jx-neuron: standard output: No space left on device\n"
    closed = streams(">&-", *arguments)
    assert (closed.returncode, closed.stdout) == (2, "")
    assert closed.stderr == "jx-neuron: standard output is closed; send it to a file, or to /dev/null\n"


def test_a_pipe_that_nobody_reads_ends_it_quietly(checkpoint: Path) -> None:
    done = streams("> >(sleep 0)", "plan", "gpt2")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_a_closed_or_full_standard_error_hides_no_answer(checkpoint: Path) -> None:
    answer = run("sample", checkpoint, "ab", *FEW).stdout
    assert answer
    for redirection in ("2>&-", "2>/dev/full"):
        whole = streams(redirection, "sample", checkpoint, "ab", *FEW)
        assert (whole.returncode, whole.stdout) == (0, answer)
        assert streams(redirection, "plan", "gpt2").stdout == streams("", "plan", "gpt2").stdout
        refusal = streams(redirection, "sample", "no/such/model", "x")
        assert (refusal.returncode, refusal.stdout) == (2, "")


def test_an_encoding_that_cannot_hold_the_answer(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jx_neuron", "sample", str(checkpoint), "no—where", "--max-new-tokens", "4"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "PYTHONIOENCODING=utf-8" in done.stderr


def test_a_fault_of_ours_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jx_neuron.models.known.config_of", lambda *_, **__: 1 / 0)
    done = run("plan", "gpt2")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
