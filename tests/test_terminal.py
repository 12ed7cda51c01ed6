"""The command line in terminals of 80 and of 40 columns, with colour and without, and its shell completion."""

import fcntl
import os
import pty
import re
import shlex
import stat
import struct
import subprocess
import sys
import termios
from pathlib import Path
from unittest import mock

import pytest
import tiny
from test_cli import run

from jx_neuron.cli.terminal import fold
from jx_neuron.models.known import KNOWN
from jx_neuron.planning import INSTANCES

COMMANDS = ("sample", "compile", "check", "plan", "bench")
PLAIN = {"NO_COLOR": "1", "TERM": "dumb"}
COLOURED = {"TERM": "xterm-256color"}
ESCAPE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """jx-neuron, as an installed package has it."""
    path = tmp_path_factory.mktemp("bin") / "jx-neuron"
    path.write_text(f"#!{sys.executable}\nfrom jx_neuron.cli import main\nmain()\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def environment(**changed: str) -> dict[str, str]:
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "NEURON_CC_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1", **changed}


def in_terminal(program: Path, columns: int, how: dict[str, str], *arguments: object) -> tuple[int, str]:
    """The exit status, and everything that was written to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [str(program), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**how))
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 2**16)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode()


def screen(written: str) -> list[str]:
    """What is left on the screen: returns, erased lines and the cursor's way up are followed, colours dropped."""
    lines, row = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[[?\d;]*[A-Za-z])", written):
        code = ESCAPE.fullmatch(part)
        if part == "\r":
            lines[row] += "\r"
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code and code[2] == "A":
            row -= int(code[1] or 1)
        elif code and code[2] == "K":
            lines[row] = ""
        elif not code:
            lines[row] = part if part and lines[row].endswith("\r") else lines[row] + part
    return [line.replace("\r", "").rstrip() for line in lines]


def fits(lines: list[str], columns: int) -> None:
    """No line is wider than the terminal, but for a single word that is."""
    for line in lines:
        assert len(line) <= columns or " " not in line.strip(), line
        assert "…" not in line, line


@pytest.mark.parametrize(
    ("columns", "how"),
    [
        pytest.param(40, PLAIN, id="40 plain"),
        pytest.param(40, COLOURED, id="40 coloured", marks=pytest.mark.slow),
        pytest.param(80, PLAIN, id="80 plain", marks=pytest.mark.slow),
        pytest.param(80, COLOURED, id="80 coloured", marks=pytest.mark.slow),
    ],
)
def test_what_it_writes_fits_the_terminal(
    program: Path, columns: int, how: dict[str, str], tmp_path: Path, artifact: Path
) -> None:
    lowered = ("--n-positions", 16, "--tp", 2, "--hlo-only", "--output", tmp_path / "out")
    said = []
    for status, arguments in (
        (0, ("--help",)),
        (0, ("plan", "facebook/opt-13b", "--instance", "trn1.32xlarge")),
        (2, ("plan", "facebook/opt-30b", "--instance", "trn1.2xlarge")),
        (0, ("compile", artifact.parent, *lowered)),
        (1, ("check", tmp_path / "out", "--target", "inf2", "--lnc", 2)),
        (2, ("check", tmp_path / "out", "--lnc", 3)),
        (2, ("sampel",)),
    ):
        done, written = in_terminal(program, columns, how, *arguments)
        assert done == status, written
        lines = screen(written)
        fits(lines, columns)
        said += lines
        assert "Traceback" not in written
        assert "Warning" not in written
        if how is PLAIN:
            assert not re.search(r"\x1b\[[\d;]*m", written)
    text = " ".join(" ".join(said).split())
    assert "jx-neuron: tp_degree=2 pads a vocabulary of 101 to 102" in text
    assert "Error: No such command 'sampel'. Did you mean 'sample'?" in text


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint's model.safetensors, beside its config.json."""
    return tiny.saved("gpt2", tmp_path_factory.mktemp("gpt2")) / "model.safetensors"


def test_each_line_is_answered_as_it_is_typed(program: Path, tmp_path: Path) -> None:
    folder = tiny.saved("gpt2", tmp_path / "gpt2", tiny.tokenizer())
    ours, theirs = pty.openpty()
    command = [str(program), "sample", str(folder), "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**PLAIN))
    os.close(theirs)

    def until(end: str) -> str:
        written = ""
        while not written.endswith(end):
            written += os.read(ours, 1).decode()
        return written.replace("\r\n", "\n")

    assert until("> ") == "Type a prompt a line; end with Ctrl-D.\n> "
    for text in ("ab", "cde"):
        os.write(ours, f"{text}\n".encode())
        answer = run("sample", folder, text, "--max-new-tokens", 4).stdout
        assert until("> ") == f"{text}\n{answer}> "  # what was typed comes first
    os.write(ours, b"x" * 93 + b"\n")
    assert "jx-neuron: a prompt of 93 tokens and an answer of 4 (--max-tokens) make 97" in " ".join(until("> ").split())
    os.write(ours, b"\x04")
    assert "8 tokens, " in until("first token after")
    assert process.wait(30) == 0
    os.close(ours)


def test_a_progress_bar_leaves_nothing(program: Path, artifact: Path, tmp_path: Path) -> None:
    how = ("--n-positions", 16, "--hlo-only", "--no-weights", "-o", tmp_path / "out")
    status, written = in_terminal(program, 80, COLOURED, "compile", artifact.parent / "config.json", *how)
    assert status == 0, written
    assert "lowering" in written
    assert written.index("\x1b[?25l") < written.rindex("\x1b[?25h")  # the cursor is hidden, and shown again
    left = screen(written)
    assert not any("lowering" in line for line in left)
    assert left[1].split() == ["program", "instructions", "collectives", "HLO", "seconds"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 40])
def test_help_fits_and_keeps_words_whole(command: str, columns: int) -> None:
    text = helped(command, columns)
    fits(text.splitlines(), columns)
    words = {word for word in text.split() if word.startswith("--")}
    assert {"--help", "--json"} <= words
    assert "[default:" in text or command == "check"
    if command == "compile":
        assert "half of each token bucket" in " ".join(text.split())
        assert "--context-length-estimate" in words


def helped(command: str, columns: int) -> str:
    from jx_neuron.cli import terminal

    with mock.patch.object(terminal, "columns", return_value=columns):
        return run(command, "--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 40])
def test_commands_in_help_can_be_typed(command: str, columns: int) -> None:
    examples = re.findall(r"^    (jx-neuron .*)$", helped(command, columns).replace("\\\n", ""), re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["jx-neuron", command]
        assert not any("  " in word for word in words)
        for option in words:
            if option.startswith("--"):
                assert option in helped(command, 80)


def test_words_stay_whole_and_lines_keep_their_indent() -> None:
    assert fold("  error: a-word-with-hyphens and more", 20) == "  error:\n  a-word-with-hyphens\n  and more"
    assert fold("one\n\ntwo", 40) == "one\n\ntwo"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("p",), ["plan"]),
        (("plan", "--strict", "facebook/opt-1"), ["facebook/opt-125m", "facebook/opt-1.3b", "facebook/opt-13b"]),
        (("compile", ""), list(KNOWN)),
        (("sample", "gpt2-"), ["gpt2-medium", "gpt2-large", "gpt2-xl"]),
        (("bench", "EleutherAI/gpt-j"), ["EleutherAI/gpt-j-6B"]),
        (("plan", "gpt2", "--amp", ""), ["f32", "f16", "bf16"]),
        (("check", "--target", "trn1"), ["trn1", "trn1n"]),
        (("compile", "gpt2", "--target", ""), ["inf2", "trn1", "trn1n", "trn2", "trn3"]),
        (("plan", "--instance", ""), [instance.name for instance in INSTANCES]),
        (("compile", "gpt2", "--context"), ["--context-length-estimate"]),
        (("plan", "./no-known-name"), []),
    ],
)
def test_completion(typed: tuple[str, ...], expected: list[str]) -> None:
    words = " ".join(["jx-neuron", *typed])
    bash = {"_JX_NEURON_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(typed))}
    with mock.patch.dict(os.environ, bash):
        assert run().stdout.split() == expected
    with mock.patch.dict(os.environ, {"_JX_NEURON_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}):
        assert re.findall(r'^(?:.*\(\()?"([^"]+)"', run().stdout, re.MULTILINE) == expected
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": words}
    with mock.patch.dict(os.environ, {"_JX_NEURON_COMPLETE": "complete_fish"} | fish):
        assert [line.split("\t")[0] for line in run().stdout.splitlines() if line] == expected


def test_bash_completes_with_what_is_installed(program: Path, tmp_path: Path) -> None:
    script = """
jx-neuron --install-completion > "$HOME/said"
source "$HOME/.bash_completions/jx-neuron.sh"
COMP_WORDS=(jx-neuron compile gpt2 --target trn1); COMP_CWORD=4
_jx_neuron_completion jx-neuron
printf '%s\\n' "${COMPREPLY[@]}"
complete -p jx-neuron
"""
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "--norc", "-c", script]
    how = environment(HOME=str(tmp_path), PATH=path)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=how)
    assert done.stdout.splitlines() == ["trn1", "trn1n", "complete -o default -F _jx_neuron_completion jx-neuron"]
    assert "bash completion installed" in (tmp_path / "said").read_text()
