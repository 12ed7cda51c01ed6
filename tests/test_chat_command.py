"""jx-neuron chat: through pipes, in a terminal, and what it computes."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_cli import run
from test_terminal import PLAIN, environment

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.cli.chat import _messages, _typed_lines
from jx_neuron.engine.conversation import Conversation

TEMPLATE = (  # the tiny tokenizer has no newline
    "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }}; {% endfor %}"
    "{% if add_generation_prompt %}[a] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer(TEMPLATE))


def test_each_answer_is_what_the_whole_conversation_gives(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    done = run(
        "chat", folder, "--system", "be kind", "--max-new-tokens", 6, stdin=f"ab\n\ncd\n/save {kept}\n/exit\nx\n"
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(kept.read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert done.stdout == f"{messages[2]['content']}\n{messages[4]['content']}\n"
    model = NeuronAutoModelForCausalLM.from_pretrained(folder)
    for end in (2, 4):
        text = model.tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
        found = model.generate(text, SamplingParams(max_tokens=6))
        assert found.text == messages[end]["content"]


@pytest.mark.parametrize("backend", ["xla", "host"])
def test_only_new_tokens_are_computed(backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=96, backend=backend)
    engine, counts, sampling = model.engine, [], SamplingParams(max_tokens=8)
    plan = engine.scheduler.plan

    def counted():
        planned = plan()
        counts.extend(row.count for turn in planned.turns for row in turn.rows)
        return planned

    monkeypatch.setattr(engine.scheduler, "plan", counted)
    conversation, ids = Conversation(engine), [5, 6, 7, 8]
    for turn in range(6):
        alone = list(model.generate([ids], sampling)[0].ids) if turn == 0 else None
        counts.clear()
        answer = [event.token for event in conversation.answer(model.request(ids, sampling))]
        assert alone is None or answer == alone
        # the last token of an answer was drawn and not computed
        if turn:
            assert sum(counts) == 4 + 7
        assert answer == tiny.greedy(tiny.model("llama"), [ids], len(ids) + 8)[0, len(ids) :].tolist()
        ids = [*ids, *answer, 9, 10, turn]


def test_a_stopped_answer_is_gone_on_from(folder: Path) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=64)
    conversation, ids, sampling = Conversation(model.engine), [1, 2, 3], SamplingParams(max_tokens=20)
    events = conversation.answer(model.request(ids, sampling))
    ids += [next(events).token for _ in range(5)]
    events.close()
    answer = [event.token for event in conversation.answer(model.request([*ids, 4], sampling))]
    assert answer == list(model.generate([[*ids, 4]], sampling)[0].ids)


def test_commands(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    typed = f"/help\n/system be  brief\n/save {one}\nab\n/reset\n/save {two}\n"
    done = run("chat", folder, "--max-new-tokens", 2, stdin=typed)
    assert done.returncode == 0, done.stderr
    assert json.loads(one.read_text()) == [{"role": "system", "content": "be  brief"}]
    assert json.loads(two.read_text()) == []
    assert "/reset " in done.stderr
    assert "(cut short by --max-tokens" in done.stderr


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("/rest\n", "there is no /rest; /help lists what there is"),
        ("/save\n", "/save takes the name of a file"),
        ("a" * 200, "n_positions=96 leaves no room for an answer: say less, /reset, or start with a larger"),
    ],
)
def test_what_cannot_be_done_is_said(typed: str, words: str, folder: Path) -> None:
    done = run("chat", folder, stdin=typed)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    folder = tiny.saved("llama", tmp_path, tiny.tokenizer())
    done = run("chat", folder, stdin="a\n")
    assert done.returncode == 2
    assert "this tokenizer has no chat template; use jx-neuron sample" in done.stderr


def test_messages_of_several_lines() -> None:
    lines = ["a\\", "b", '"""c', "", 'd"""', '"""e"""', "f", "g\\"]
    assert list(_messages(iter(lines))) == ["a\nb", "c\n\nd", "e", "f", "g\\"]


def test_a_terminal_that_is_gone_ends_what_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(sign: str) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.input", gone)
    assert list(_typed_lines()) == []


# a shell may have had SIGINT ignored; the first terminal that a session's leader opens is where Ctrl-C comes from
IN_TERMINAL = """import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
os.close(os.open(os.ttyname(0), os.O_RDWR))
from jx_neuron.cli import main
main()
"""


class Terminal:
    """jx-neuron chat in a terminal of its own."""

    def __init__(self, *arguments: object):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, "chat", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**PLAIN), start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def until(self, end: str) -> str:
        """What is written up to `end`."""
        written, deadline = "", time.monotonic() + 60
        while not written.endswith(end):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{end!r} was awaited after {written!r}"
            written += os.read(self._ours, 1).decode().replace("\r", "")
        return written

    def type(self, keys: str) -> None:
        """Presses keys, once readline waits for them: between two, it would miss an interrupt until the next."""
        time.sleep(0.3)
        os.write(self._ours, keys.encode())


@pytest.mark.slow
def test_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    long = shutil.copytree(folder, tmp_path / "long")
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    terminal, other = Terminal(long), Terminal(folder)
    terminal.until("leaves.\n> ")
    terminal.type("half a mess")
    terminal.until("half a mess")
    terminal.type("\x03")  # Ctrl-C
    assert terminal.until("> ") == "\n> "
    terminal.type("abc\n")
    terminal.until("abc\n")
    terminal.type("\x03")
    terminal.until("(stopped)\n> ")
    terminal.type("\x1b[A\n")  # what was typed before
    terminal.until("abc\n")
    terminal.type("\x03")
    terminal.until("(stopped)\n> ")
    kept = tmp_path / "kept.json"
    terminal.type(f"/save {kept}\n")
    terminal.until("\n> ")
    said = [message["content"] for message in json.loads(kept.read_text())]
    assert len(said) == 4
    assert said[::2] == ["abc", "abc"]
    terminal.type("/nothing\n")
    assert "there is no /nothing" in terminal.until("lists what there is\n> ")
    terminal.type("\x03")
    assert terminal.until("leaves.\n> ") == "\nCtrl-C again, or Ctrl-D, leaves.\n> "
    terminal.type("\x03")
    assert terminal.process.wait(30) == 0
    other.until("leaves.\n> ")
    other.type("\x04")  # Ctrl-D
    assert other.process.wait(30) == 0
