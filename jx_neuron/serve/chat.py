"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from jx_neuron.serve.answers import Answers, Piece
from jx_neuron.serve.conversation import text_of, tokens_of
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.grammars import grammar_of, schema_grammar
from jx_neuron.serve.http import DONE, Chunks, sse
from jx_neuron.serve.logprobs import Texts, chat_logprob, prompt_logprobs
from jx_neuron.serve.protocol import ChatRequest, NamedTool, StreamOptions
from jx_neuron.serve.served import Served
from jx_neuron.serve.tools import Call, Parser, forced_schema, parser_of


async def chat_completions(served: Served, fields: dict[str, Any]) -> dict[str, Any] | Chunks:
    """Answers a conversation."""
    served.require_length(fields.get("messages"), "messages")
    request = ChatRequest.model_validate(fields)
    answers = await chat_answers(served, request)
    chat = _Chat(served, request, answers)
    return Chunks(chat.chunks(), chat.answers.close) if request.stream else await chat.whole()


async def chat_answers(served: Served, request: ChatRequest) -> Answers:
    """Submits the answers to a conversation. Raises APIError for what cannot be answered."""
    served.require_name(request.model)
    served.require_count(1, request.n)
    choice, tools = request.tool_choice, request.tools or []
    forced = choice == "required" or isinstance(choice, NamedTool)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs takes logprobs=true", "top_logprobs")
    top = served.require_logprobs("top_logprobs", request.top_logprobs or 0) if request.logprobs else None
    of_prompt = served.require_logprobs("prompt_logprobs", request.prompt_logprobs)
    template = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        template.setdefault("reasoning_effort", request.reasoning_effort)
    prompt = await tokens_of(
        served,
        request.messages,
        None if choice == "none" else tools,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=request.add_special_tokens,
        template_kwargs=template,
        any_length=request.truncate_prompt_tokens is not None,
    )
    prompt = served.truncated(prompt, request.truncate_prompt_tokens)
    if not prompt:
        raise invalid("the conversation has no tokens", "messages")
    grammar = await grammar_of(served, request)
    if forced:
        if grammar is not None:
            raise invalid("tool_choice forces a call; leave response_format and structured_outputs out", "tool_choice")
        assert choice is not None
        schema = forced_schema(tools, choice, request.parallel_tool_calls is not False)
        grammar = await schema_grammar(served, schema)
    most = request.max_completion_tokens
    most = served.room(prompt, request.max_tokens if most is None else most)
    sampling = served.sampling(request, max_tokens=most, logprobs=top, grammar=grammar)
    return Answers(
        served,
        [prompt],
        [sampling],
        prompt_logprobs=of_prompt,
        request=request,
    )


def parser(served: Served, request: ChatRequest) -> Parser | None:
    """What finds calls in an answer; None where the request has no tools."""
    if not request.tools or request.tool_choice == "none":
        return None
    return parser_of(str(served.tokenizer.chat_template), request.tool_choice)


def finish_reason(request: ChatRequest, reason: str | None, called: bool) -> str | None:
    """OpenAI's reason: "tool_calls" where the model chose to call."""
    return "tool_calls" if reason == "stop" and called and not isinstance(request.tool_choice, NamedTool) else reason


@dataclass
class _Choice:
    parser: Parser | None
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    begun: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece adds to the message."""
        last = piece.finish_reason is not None
        parts: Iterator[str | Call] = iter(())
        if self.parser is not None:
            parts = self.parser.add(piece.text, last=last)
        elif piece.text:
            parts = iter([piece.text])
        for part in parts:
            if isinstance(part, str):
                self.content += part
                yield dict(content=part)
            else:
                function = dict(name=part.name, arguments=part.arguments)
                self.calls.append(dict(id=part.id, type="function", function=function))
                yield dict(tool_calls=[dict(index=len(self.calls) - 1, **self.calls[-1])])


@dataclass
class _Chat:
    served: Served
    request: ChatRequest
    answers: Answers

    def __post_init__(self) -> None:
        self._texts = Texts(self.served, bool(self.request.return_tokens_as_token_ids))
        self._choices = [_Choice(parser(self.served, self.request)) for _ in range(self.answers.n)]
        self._head = dict(
            id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=self.served.named(self.request.model)
        )

    def _echo(self) -> str:
        last = self.request.messages[-1]
        return text_of(last) if self.request.echo and last.role == "assistant" else ""

    def _logprob(self, piece: Piece) -> list[dict[str, Any]]:
        return [chat_logprob(self._texts, piece.event)] if self.request.logprobs else []

    async def whole(self) -> dict[str, Any]:
        """The response with all choices."""
        try:
            async for piece in self.answers:
                choice = self._choices[piece.choice]
                for _ in choice.deltas(piece):
                    pass
                choice.logprobs += self._logprob(piece)
                choice.ids.append(piece.event.token)
                choice.finish_reason = finish_reason(self.request, piece.finish_reason, bool(choice.calls))
                choice.stop_reason = piece.stop_reason
        finally:
            self.answers.close()
        whole: dict[str, Any] = dict(self._head, object="chat.completion", usage=self.answers.usage)
        whole["choices"] = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        if self.request.prompt_logprobs is not None:
            values = self.answers.streams[0].prompt_logprobs or []
            whole["prompt_logprobs"] = prompt_logprobs(self.served, self.answers.prompts[0], values)
        if self.request.return_token_ids:
            whole["prompt_token_ids"] = self.answers.prompts[0]
        return whole

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        content = self._echo() + choice.content
        message: dict[str, Any] = dict(
            role="assistant", content=None if choice.calls and not content else content, refusal=None
        )
        if choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = dict(content=choice.logprobs, refusal=None) if self.request.logprobs else None
        fields: dict[str, Any] = dict(index=index, message=message, logprobs=logprobs)
        fields |= dict(finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)
        return fields | (dict(token_ids=choice.ids) if self.request.return_token_ids else {})

    async def chunks(self) -> AsyncIterator[str]:
        """The response as server-sent events."""
        options = self.request.stream_options or StreamOptions()
        usage = bool(options.continuous_usage_stats)
        async for piece in self.answers:
            choice, ends = self._choices[piece.choice], piece.finish_reason is not None
            if not choice.begun:
                choice.begun = True
                prompt = dict(prompt_token_ids=self.answers.prompts[0]) if self.request.return_token_ids else {}
                delta = dict(role="assistant", content=self._echo())
                yield sse(self._chunk([self._delta(piece, delta)], usage) | prompt)
            deltas = list(choice.deltas(piece))
            logprobs = self._logprob(piece)
            if not deltas and (logprobs or usage or ends or self.request.return_token_ids):
                deltas = [{}]
            for number, delta in enumerate(deltas, 1):
                final = ends and number == len(deltas)
                entry = self._delta(piece, delta, logprobs if number == 1 else [])
                if final:
                    reason = finish_reason(self.request, piece.finish_reason, bool(choice.calls))
                    entry |= dict(finish_reason=reason, stop_reason=piece.stop_reason)
                if self.request.return_token_ids and number == 1:
                    entry["token_ids"] = [piece.event.token]
                yield sse(self._chunk([entry], usage))
        if options.include_usage:
            yield sse(self._chunk([], True))
        yield DONE

    def _delta(
        self, piece: Piece, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        content = dict(content=logprobs, refusal=None) if logprobs else None
        return dict(index=piece.choice, delta=delta, logprobs=content, finish_reason=None)

    def _chunk(self, choices: list[dict[str, Any]], usage: bool) -> dict[str, Any]:
        chunk = dict(self._head, object="chat.completion.chunk", choices=choices)
        return chunk | (dict(usage=self.answers.usage) if usage else {})
