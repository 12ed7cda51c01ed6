"""jx-neuron chat: through pipes, in a terminal, and what it computes."""

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
from test_cli import run
from test_terminal import PLAIN, environment, program  # noqa: F401  a fixture

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.cli.chat import _messages
from jx_neuron.engine.conversation import Conversation

TEMPLATE = (  # the tiny tokenizer has no newline
    "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }}; {% endfor %}"
    "{% if add_generation_prompt %}[a] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.saved("llama", tmp_path_factory.mktemp("llama"))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


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
        (found,) = model.generate(text, SamplingParams(max_tokens=6))
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
    assert "(cut short by --max-new-tokens" in done.stderr


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
    folder = tiny.saved("llama", tmp_path)
    tiny.tokenizer().save_pretrained(folder)
    done = run("chat", folder, stdin="a\n")
    assert done.returncode == 2
    assert "this tokenizer has no chat template; use jx-neuron sample" in done.stderr


def test_messages_of_several_lines() -> None:
    lines = ["a\\", "b", '"""c', "", 'd"""', '"""e"""', "f", "g\\"]
    assert list(_messages(iter(lines))) == ["a\nb", "c\n\nd", "e", "f", "g\\"]


class Terminal:
    def __init__(self, *command: object):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**PLAIN),
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def until(self, end: str) -> str:
        written, deadline = b"", time.monotonic() + 60
        while not written.endswith(end.encode()):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{end!r} was awaited after {written!r}"
            written += os.read(self._ours, 1)
        return written.decode().replace("\r\n", "\n")

    def type(self, text: str) -> None:
        time.sleep(0.5)  # readline readies the terminal after it has printed the sign
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.mark.slow  # a terminal and signals: it waits in vain at times
def test_control_c_stops_the_answer_and_not_the_program(program: Path) -> None:  # noqa: F811
    terminal = Terminal(program, "chat", "--demo", "--n-positions", 1024)
    terminal.until("> ")
    terminal.type("half a mess")
    terminal.until("half a mess")
    terminal.interrupt()
    terminal.until("> ")
    terminal.type("Write a very long story about a fox.\n")
    terminal.until("fox.\n".replace("\n", "\r\n"))
    terminal.until(" ")
    terminal.interrupt()
    terminal.until("(stopped)\r\n> ")
    terminal.type("/nothing\n")
    assert "there is no /nothing" in terminal.until("lists what there is")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
