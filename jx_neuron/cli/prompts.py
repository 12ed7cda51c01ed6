"""Prompts of the command line: text or token ids, from its arguments or from standard input."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from jx_neuron.cli.options import path
from jx_neuron.engine.messages import rendered_by_template
from jx_neuron.errors import InputError, JxNeuronError

SIGN = "> "


@dataclass(frozen=True)
class Prompt:
    """A prompt as typed, as printed before its answer, and as tokens."""

    text: str
    printed: str
    ids: list[int]


def from_text(model: Any, text: str, chat: bool, system: str = "") -> Prompt:
    """A text, tokenized; with `chat`, rendered by the chat template first, after a system message if any. Raises
    InputError."""
    try:
        tokenizer = model.tokenizer if chat else model.text_tokenizer
    except JxNeuronError as error:
        raise InputError(f"{error}\nA prompt may be given as token ids: --ids 1,2,3") from error
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rendered = rendered_by_template(tokenizer, messages, "leave --chat and --system out") if chat else text
    ids: list[int] = tokenizer(rendered, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise InputError(f"the prompt {text!r} has no tokens; give it some text")
    return Prompt(text, "" if chat else text, ids)


def from_ids(model: Any, text: str) -> Prompt:
    """Token ids separated by commas or spaces; printed as text where the model has a tokenizer. Raises InputError."""
    from jx_neuron.engine.prompts import row_of

    words = re.split(r"[\s,]+", text.strip())
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--ids {text!r} is not legal; it takes token ids, such as 1,2,3")
    ids = row_of([int(word) for word in words], model.limits, "--ids").tolist()
    try:
        printed = model.text_tokenizer.decode(ids)
    except JxNeuronError:
        printed = ",".join(words)
    return Prompt(text, printed, ids)


def read_text(name: str) -> str:
    """The text of a file, or of standard input where `name` is "-". Raises InputError where it is not UTF-8."""
    if name == "-" and sys.stdin is None:
        raise InputError("standard input is closed; name a file")
    data = sys.stdin.buffer.read() if name == "-" else Path(path(name)).expanduser().read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        where = "standard input" if name == "-" else name
        raise InputError(f"{where} is not UTF-8 text; convert it, or name another file") from None


def texts_of(prompts: Sequence[str] | None, files: Sequence[str] | None) -> list[str]:
    """The texts of --prompt and --file; a file's last line end is left out."""
    return [*(prompts or []), *(read_text(name).removesuffix("\n").removesuffix("\r") for name in files or [])]


def typed() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def lines() -> Iterator[str]:
    """Yields the lines of standard input that are not blank, after a prompt sign in a terminal. Raises InputError."""
    return (line for line in every_line() if line.strip())


def every_line() -> Iterator[str]:
    """Yields the lines of standard input, after a prompt sign in a terminal.

    Raises InputError where standard input is closed, and for a line that is not UTF-8.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed; give a prompt after MODEL")
    for number, line in enumerate(iter(_line, b""), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} of standard input is not UTF-8 text: {error}; convert it first") from error
        yield text.removesuffix("\n").removesuffix("\r")


def _line() -> bytes:
    if not typed():
        return sys.stdin.buffer.readline()
    typer.echo(SIGN, nl=False, err=True)
    line = sys.stdin.buffer.readline()
    if not line:
        typer.echo(err=True)
    return line
