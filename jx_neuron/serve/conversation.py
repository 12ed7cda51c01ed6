"""Conversations as the chat template writes them."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jx_neuron.serve.errors import APIError, invalid
from jx_neuron.serve.protocol import Message, Tool
from jx_neuron.serve.served import Served

RESERVED = frozenset("chat_template conversation messages tools tokenize return_dict return_tensors padding".split())
TOOLS_IN_TEXT = """You may call these functions. To call one, write a line
<tool_call>{"name": "the function's name", "arguments": {"an argument": "its value"}}</tool_call>
Functions, one a line, as JSON:
"""
"""The system message for chat templates that have no place for tools; its calls are Hermes's."""


async def tokens_of(
    served: Served,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    add_special_tokens: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    any_length: bool = False,
) -> list[int]:
    """The tokens of a conversation, as `Served.encode` makes them. Raises APIError where the template refuses it."""
    if continue_final_message and add_generation_prompt:
        raise invalid("continue_final_message takes add_generation_prompt=false", "continue_final_message")
    if reserved := RESERVED & (template_kwargs or {}).keys():
        raise invalid(f"chat_template_kwargs may not hold {min(reserved)}", "chat_template_kwargs")
    tokenizer = served.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise invalid("this model's tokenizer has no chat template; use /v1/completions", "messages")

    def render() -> str:
        plain = [_plain(message) for message in messages]
        functions = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        if functions and not takes_tools(tokenizer):
            plain, functions = _with_tools(plain, functions), []
        text: str = tokenizer.apply_chat_template(
            plain,
            tools=functions or None,
            tokenize=False,
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=bool(continue_final_message),
            **(template_kwargs or {}),
        )
        return text

    try:
        text = await asyncio.to_thread(render)
    except APIError:
        raise
    except Exception as error:  # a template is a program, and raises what it likes
        raise invalid(f"the chat template fails: {str(error) or type(error).__name__}", "messages") from error
    return await served.encode(text, bool(add_special_tokens), any_length=any_length)


def takes_tools(tokenizer: Any) -> bool:
    """Whether a chat template writes tools."""
    return "tools" in str(tokenizer.chat_template)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates take it: content as one text, arguments of calls as objects."""
    fields = message.model_dump(exclude_none=True, exclude={"annotations"})
    fields["role"] = "system" if message.role == "developer" else message.role
    fields["content"] = text_of(message)
    for call in fields.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            raise invalid("the arguments of a tool call are JSON text", "messages") from None
    return fields


def text_of(message: Message) -> str:
    """The text of a message."""
    content = message.content
    if isinstance(content, list):
        return "\n".join(part.text or part.refusal or "" for part in content)
    return content or ""


def _with_tools(messages: list[dict[str, Any]], functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that begin with the tools as text; calls and their results as text too."""
    text = TOOLS_IN_TEXT + "\n".join(json.dumps(tool["function"]) for tool in functions)
    written = []
    for message in messages:
        content, role = message["content"], message["role"]
        for call in message.get("tool_calls", ()):
            content += f"<tool_call>{json.dumps(call['function'])}</tool_call>"
        if role == "tool":
            content, role = f"<tool_response>{content}</tool_response>", "user"
        written.append(dict(role=role, content=content))
    if written[0]["role"] == "system":
        first = written.pop(0)
        text = f"{first['content']}\n\n{text}"
    return [dict(role="system", content=text), *written]
