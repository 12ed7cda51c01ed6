"""POST /v1/responses: text, and calls of functions. Nothing is kept.

https://platform.openai.com/docs/api-reference/responses
"""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from jx_neuron.serve.answers import Answers
from jx_neuron.serve.chat import chat_answers, parser
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.http import Chunks, sse
from jx_neuron.serve.protocol import Body, ChatRequest, Message, Several, Tool
from jx_neuron.serve.served import Served
from jx_neuron.serve.tools import Call


class TextFormat(Body):
    """How the text is written."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """The options of the text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Body):
    """How much the model should think, for templates that take it."""

    effort: str | None = None
    summary: None = None


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Several[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: Several[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    truncation: Literal["disabled", "auto"] | None = None
    include: Several[str] | None = Field(None, max_length=0)


async def responses(served: Served, fields: dict[str, Any]) -> dict[str, Any] | Chunks:
    """Answers a conversation in the form of the Responses API."""
    served.require_length(fields.get("input"), "input")
    request = ResponsesRequest.model_validate(fields)
    chat = _chat_request(request)
    if request.truncation == "auto":
        chat = chat.model_copy(update=dict(truncate_prompt_tokens=served.capacity - (request.max_output_tokens or 1)))
    response = _Response(served, request, chat, await chat_answers(served, chat))
    return Chunks(response.chunks(), response.answers.close) if request.stream else await response.whole()


def _chat_request(request: ResponsesRequest) -> ChatRequest:
    items = [dict(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    messages = [dict(role="system", content=request.instructions)] if request.instructions else []
    messages += [_message(item) for item in items]
    fields: dict[str, Any] = dict(messages=[Message.model_validate(message) for message in messages])
    for name in ("model", "temperature", "top_p", "top_k", "seed", "parallel_tool_calls", "stream"):
        fields[name] = getattr(request, name)
    fields["max_completion_tokens"] = request.max_output_tokens
    fields["reasoning_effort"] = request.reasoning.effort if request.reasoning else None
    fields["tools"] = [
        Tool.model_validate(dict(function=tool.model_dump(exclude={"type"}))) for tool in request.tools or ()
    ] or None
    choice = request.tool_choice
    fields["tool_choice"] = dict(function=dict(name=choice.name)) if isinstance(choice, FunctionChoice) else choice
    if request.text and (how := request.text.format) and how.type != "text":
        fields["response_format"] = dict(type=how.type)
        if how.type == "json_schema":
            fields["response_format"]["json_schema"] = dict(name=how.name, schema=how.schema_)
    return ChatRequest.model_validate(fields)


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """An item of the input as a message of a chat."""
    match item.get("type", "message"):
        case "message":
            return {name: value for name, value in item.items() if name in ("role", "content")}
        case "function_call":
            function = dict(name=item.get("name"), arguments=item.get("arguments"))
            return dict(role="assistant", tool_calls=[dict(id=item.get("call_id"), function=function)])
        case "function_call_output":
            return dict(role="tool", tool_call_id=item.get("call_id"), content=item.get("output"))
    raise invalid(
        f"input holds an item of type {str(item.get('type'))[:40]!r}; text and function calls are taken", "input"
    )


@dataclass
class _Response:
    served: Served
    request: ResponsesRequest
    chat: ChatRequest
    answers: Answers
    output: list[dict[str, Any]] = field(default_factory=list)
    events: int = 0

    def __post_init__(self) -> None:
        self._parser = parser(self.served, self.chat)
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())

    async def _parts(self) -> AsyncGenerator[tuple[list[str | Call], str | None], None]:
        """Yields the parts of the answer that are not empty, or one that is, and the reason for its end."""
        try:
            async for piece in self.answers:
                last = piece.finish_reason is not None
                parts = [piece.text] if self._parser is None else self._parser.add(piece.text, last=last)
                some: list[str | Call] = [part for part in parts if part]
                yield some or ([""] if last and not self.output else []), piece.finish_reason
        finally:
            self.answers.close()

    async def whole(self) -> dict[str, Any]:
        """The response."""
        reason = None
        async for parts, reason in self._parts():  # noqa: B007
            for part in parts:
                self._take(part)
        self._finish()
        return self._body(reason)

    def _take(self, part: str | Call) -> dict[str, Any]:
        """Adds a part to the output, and returns its item."""
        if isinstance(part, Call):
            self._finish()
            call = dict(type="function_call", id=f"fc_{uuid.uuid4().hex}", call_id=part.id, name=part.name)
            self.output.append(call | dict(arguments=part.arguments, status="completed"))
        elif not self.output or self.output[-1]["type"] != "message":
            self.output.append(
                dict(type="message", id=f"msg_{uuid.uuid4().hex}", role="assistant", status="in_progress")
            )
            self.output[-1]["content"] = [_text(part)]
        else:
            self.output[-1]["content"][0]["text"] += part
        return self.output[-1]

    def _finish(self) -> None:
        if self.output:
            self.output[-1]["status"] = "completed"

    def _body(self, reason: str | None, status: str = "") -> dict[str, Any]:
        request, usage = self.request, self.answers.usage
        incomplete = dict(reason="max_output_tokens") if reason == "length" else None
        choice = request.tool_choice
        return dict(
            id=self._id,
            object="response",
            created_at=self._created,
            status=status or ("incomplete" if incomplete else "completed"),
            error=None,
            incomplete_details=incomplete,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata={},
            model=self.served.named(self.request.model),
            output=self.output,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=None,
            temperature=request.temperature,
            top_p=request.top_p,
            text=dict(format=dict(type="text")),
            tool_choice=choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
            tools=[tool.model_dump() for tool in request.tools or ()],
            truncation=request.truncation or "disabled",
            usage=None
            if status
            else dict(
                input_tokens=usage["prompt_tokens"],
                input_tokens_details=usage["prompt_tokens_details"],
                output_tokens=usage["completion_tokens"],
                output_tokens_details=dict(reasoning_tokens=0),
                total_tokens=usage["total_tokens"],
            ),
        )

    def _event(self, kind: str, **fields: Any) -> str:
        self.events += 1
        return sse(dict(type=kind, sequence_number=self.events - 1, **fields), kind)

    async def chunks(self) -> AsyncIterator[str]:
        """The response as server-sent events."""
        yield self._event("response.created", response=self._body(None, "in_progress"))
        yield self._event("response.in_progress", response=self._body(None, "in_progress"))
        reason = None
        async for parts, reason in self._parts():  # noqa: B007
            for part in parts:
                count = len(self.output)
                opened = self.output[-1] if self.output and self.output[-1]["type"] == "message" else None
                if isinstance(part, Call) and opened:
                    for event in self._closed(opened):
                        yield event
                item = self._take(part)
                at = dict(output_index=len(self.output) - 1)
                if isinstance(part, Call):
                    where = at | dict(item_id=item["id"])
                    yield self._event(
                        "response.output_item.added", item=item | dict(arguments="", status="in_progress"), **at
                    )
                    yield self._event("response.function_call_arguments.delta", delta=part.arguments, **where)
                    yield self._event(
                        "response.function_call_arguments.done", arguments=part.arguments, name=part.name, **where
                    )
                    yield self._event("response.output_item.done", item=item, **at)
                    continue
                where = at | dict(item_id=item["id"], content_index=0)
                if len(self.output) > count:
                    yield self._event("response.output_item.added", item=item | dict(content=[]), **at)
                    yield self._event("response.content_part.added", part=_text(""), **where)
                yield self._event("response.output_text.delta", delta=part, logprobs=[], **where)
        if self.output and self.output[-1]["type"] == "message":
            for event in self._closed(self.output[-1]):
                yield event
        kind = "response.incomplete" if reason == "length" else "response.completed"
        yield self._event(kind, response=self._body(reason))

    def _closed(self, item: dict[str, Any]) -> Iterator[str]:
        """The events that end a message."""
        self._finish()
        at = dict(output_index=len(self.output) - 1)
        where = at | dict(item_id=item["id"], content_index=0)
        yield self._event("response.output_text.done", text=item["content"][0]["text"], logprobs=[], **where)
        yield self._event("response.content_part.done", part=item["content"][0], **where)
        yield self._event("response.output_item.done", item=item, **at)


def _text(text: str) -> dict[str, Any]:
    return dict(type="output_text", text=text, annotations=[], logprobs=[])
