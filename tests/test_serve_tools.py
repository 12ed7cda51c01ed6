"""Calls of tools in answers, however the text is divided into pieces."""

import json

import pytest

from jx_neuron.engine.stopping import StopFilter, held_back
from jx_neuron.serve.errors import APIError
from jx_neuron.serve.protocol import NamedTool, Tool
from jx_neuron.serve.tools import Call, Forced, Hermes, Llama, forced_schema, parser_of

ONE = '{"name": "f", "arguments": {"a": [1, {"b": "</x>"}]}}'
TWO = '{"name": "g", "arguments": {}}'
TEXT = f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>"


def parsed(parser: object, text: str, size: int) -> tuple[str, list[tuple[str, object]]]:
    """The content and the calls of a text that comes in pieces of `size` characters."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    parts = [part for n, piece in enumerate(pieces, 1) for part in parser.add(piece, last=n == len(pieces))]
    content = "".join(part for part in parts if isinstance(part, str))
    return content, [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_hermes(size: int) -> None:
    calls = [("f", {"a": [1, {"b": "</x>"}]}), ("g", {})]
    content, found = parsed(Hermes(), TEXT, size)
    assert (content.rstrip(), found) == ("Let me see.", calls)
    assert parsed(Hermes(), f"<tool_call>{TWO}", size) == ("", [("g", {})])  # the end tag may be the end token
    assert parsed(Hermes(), "1 <2 <tool", size) == ("1 <2 <tool", [])
    assert parsed(Hermes(), "<tool_call>no JSON</tool_call>", size) == ("<tool_call>no JSON</tool_call>", [])
    assert parsed(Hermes(), "plain \n text\n", size) == ("plain \n text\n", [])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_llama(size: int) -> None:
    text = '{"name": "f", "parameters": {"a": 1}}'
    assert parsed(Llama(), text, size) == ("", [("f", {"a": 1})])
    assert parsed(Llama(), f"<|python_tag|>{text}; {text}", size) == ("", [("f", {"a": 1})] * 2)
    assert parsed(Llama(), "It is {sunny}.", size) == ("It is {sunny}.", [])
    assert parsed(Llama(), '{"no": "call"}', size) == ('{"no": "call"}', [])


@pytest.mark.parametrize("size", [1, 1000])
def test_forced(size: int) -> None:
    assert parsed(Forced("f"), '{"a": 1}', size) == ("", [("f", {"a": 1})])
    assert parsed(Forced(None), f"[{ONE}, {TWO}]", size)[1] == [("f", {"a": [1, {"b": "</x>"}]}), ("g", {})]
    assert parsed(Forced("f"), '{"a": ', size) == ('{"a": ', [])


def test_the_parser_is_that_of_the_template() -> None:
    assert isinstance(parser_of("… <tool_call> …", "auto"), Hermes)
    assert isinstance(parser_of('… {"name": …, "parameters": …} …', None), Llama)
    assert isinstance(parser_of("nothing of tools", None), Hermes)
    assert isinstance(parser_of("", "required"), Forced)


def test_the_schema_of_a_forced_call() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [Tool.model_validate(dict(function=dict(name=name, parameters=schema))) for name in "fg"]
    named = NamedTool.model_validate(dict(function=dict(name="g")))
    assert forced_schema(tools, named, True) == schema
    several = forced_schema(tools, "required", False)
    assert [one["properties"]["name"] for one in several["items"]["anyOf"]] == [{"const": "f"}, {"const": "g"}]
    assert (several["minItems"], several["maxItems"]) == (1, 1)
    with pytest.raises(APIError, match="tool_choice names 'h', and tools has f, g"):
        forced_schema(tools, NamedTool.model_validate(dict(function=dict(name="h"))), True)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_text_that_may_begin_a_stop_string_is_held_back(size: int) -> None:
    stop, text = StopFilter(["END", "\n\n"], include=False), "a\nb EN and E\n\nmore"
    shown = ""
    for at in range(0, len(text), size):
        piece = text[at : at + size]
        last = "\n\n" in text[: at + size]
        added, string = stop.add(piece, last=last)
        shown += added
        assert text.startswith(shown)
        if last:
            assert (shown, string) == ("a\nb EN and E", "\n\n")
            break
    assert held_back("one <to", ["<tool>", "none"]) == 3
