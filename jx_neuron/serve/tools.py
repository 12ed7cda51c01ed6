"""Calls of tools in answers: in the formats of Hermes and Qwen, of Llama 3, and as JSON that a grammar has forced."""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jx_neuron.engine.stopping import held_back
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.protocol import NamedTool, Tool

BEGIN, END, PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"
ANY = {"type": "object"}


@dataclass(frozen=True)
class Call:
    """A call of a function; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class Parser(Protocol):
    """Divides an answer into content and calls."""

    def add(self, text: str, *, last: bool) -> Iterator[str | Call]:
        """Yields what is certain once `text` is added."""


def parser_of(template: str, choice: str | NamedTool | None) -> Parser:
    """The parser of a chat template's format, or of what `tool_choice` forces."""
    if isinstance(choice, NamedTool):
        return Forced(choice.function.name)
    if choice == "required":
        return Forced(None)
    if BEGIN not in template and (PYTHON in template or '"parameters":' in template):
        return Llama()
    return Hermes()


class Hermes:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, of Hermes 2 Pro and Qwen 2.5 and later.

    https://github.com/NousResearch/Hermes-Function-Calling
    """

    def __init__(self) -> None:
        self._text, self._inside, self._called = "", False, False

    def add(self, text: str, *, last: bool) -> Iterator[str | Call]:
        """Yields content at once, and a call when it is whole. What is no call is content."""
        self._text += text
        while True:
            before, tag, after = self._text.partition(END if self._inside else BEGIN)
            if tag and not self._inside:
                if before.strip():
                    yield before
                self._text, self._inside = after, True
            elif tag or (last and self._inside):
                parts: Sequence[str | Call] = _calls(before)
                self._called = self._called or bool(parts)
                yield from parts or [BEGIN + before + tag]
                self._text, self._inside = after, False
            else:
                break
        if not self._inside:
            blank = len(self._text) - len(self._text.rstrip())
            count = 0 if last else max(blank, held_back(self._text, [BEGIN]))
            content, self._text = self._text[: len(self._text) - count], self._text[len(self._text) - count :]
            if content.strip() or (content and not self._called):
                yield content


class Llama:
    """`{"name": …, "parameters": {…}}`, perhaps after <|python_tag|>, several separated by ";", of Llama 3.1 and later.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
    """

    def __init__(self) -> None:
        self._text, self._content = "", False

    def add(self, text: str, *, last: bool) -> Iterator[str | Call]:
        """Yields content at once, and calls when the answer has ended, which may hold either."""
        self._text += text
        start = self._text.lstrip()
        if not self._content:
            self._content = bool(start) and start[0] != "{" and not PYTHON.startswith(start[: len(PYTHON)])
        if self._content or last:
            parts: Sequence[str | Call] = () if self._content else _calls(start.removeprefix(PYTHON))
            yield from parts or ([self._text] if self._text else [])
            self._text = ""


class Forced:
    """JSON alone: the arguments of the function `name`, or a list of calls where that is None."""

    def __init__(self, name: str | None):
        self._name, self._text = name, ""

    def add(self, text: str, *, last: bool) -> Iterator[str | Call]:
        """Yields the calls when the answer has ended; content where it was cut short."""
        self._text += text
        if not last:
            return
        try:
            value = json.loads(self._text)
        except ValueError:
            yield self._text
            return
        if self._name is not None:
            yield Call(self._name, json.dumps(value))
        else:
            yield from (call for one in value if (call := _call(one)) is not None)


def _calls(text: str) -> list[Call]:
    """The calls of JSON objects, separated by ";", commas or spaces; none where the text is anything else."""
    decoder, calls, at = json.JSONDecoder(), list[Call](), 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        several = [_call(one) for one in (value if isinstance(value, list) else [value])]
        if None in several:
            return []
        calls += [call for call in several if call is not None]
        while at < len(text) and text[at] in ";, \n\t\r":
            at += 1
    return calls


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def forced_schema(tools: Sequence[Tool], choice: str | NamedTool, parallel: bool) -> dict[str, Any]:
    """The JSON schema of an answer that has to call, for `Forced`. Raises APIError for a tool that is not there."""
    parameters = {tool.function.name: tool.function.parameters or ANY for tool in tools}
    if isinstance(choice, NamedTool):
        if (name := choice.function.name) not in parameters:
            raise invalid(f"tool_choice names {name!r}, and tools has {', '.join(parameters) or 'none'}", "tool_choice")
        return parameters[name]
    if not parameters:
        raise invalid("tool_choice=required takes tools", "tool_choice")
    calls = [
        dict(
            type="object",
            properties=dict(name=dict(const=name), arguments=schema),
            required=["name", "arguments"],
            additionalProperties=False,
        )
        for name, schema in parameters.items()
    ]
    most = {} if parallel else {"maxItems": 1}
    return dict(type="array", minItems=1, items=dict(anyOf=calls)) | most
