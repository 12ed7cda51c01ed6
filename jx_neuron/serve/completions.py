"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from jx_neuron.serve.answers import Answers, Piece
from jx_neuron.serve.errors import invalid
from jx_neuron.serve.grammars import grammar_of
from jx_neuron.serve.http import DONE, Chunks, sse
from jx_neuron.serve.logprobs import CompletionLogprobs, Texts, joined, prompt_logprobs
from jx_neuron.serve.protocol import CompletionRequest, StreamOptions
from jx_neuron.serve.served import Served

DEFAULT_TOKENS = 16  # OpenAI's


async def completions(served: Served, fields: dict[str, Any]) -> dict[str, Any] | Chunks:
    """Continues prompts."""
    _require_length(served, fields)
    request = CompletionRequest.model_validate(fields)
    served.require_name(request.model)
    texts, prompts = await _prompts(served, request)
    served.require_count(len(prompts), request.n)
    wanted = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    if not wanted and not request.echo:
        raise invalid("max_tokens is 1 or more, or 0 with echo", "max_tokens")
    count = served.require_logprobs("logprobs", request.logprobs)
    of_prompt = served.require_logprobs("prompt_logprobs", request.prompt_logprobs)
    grammar = await grammar_of(served, request)
    samplings = [
        served.sampling(request, max_tokens=served.room(prompt, wanted), logprobs=count, grammar=grammar)
        for prompt in prompts
    ]
    wanted_of_prompt = max(
        (one for one in (of_prompt, count if request.echo else None) if one is not None), default=None
    )
    answers = Answers(
        served,
        prompts,
        samplings,
        prompt_logprobs=wanted_of_prompt,
        request=request,
    )
    completion = _Completion(served, request, answers, texts)
    return Chunks(completion.chunks(), completion.answers.close) if request.stream else await completion.whole()


def _require_length(served: Served, fields: dict[str, Any]) -> None:
    """Raises APIError where a request has too many prompts, or a prompt too many tokens, whatever these are."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        served.require_count(len(prompt), None)
    elif fields.get("truncate_prompt_tokens") is None:
        served.require_length(prompt, "prompt")


async def _prompts(served: Served, request: CompletionRequest) -> tuple[list[str | None], list[list[int]]]:
    """The texts of the prompts, None for token ids, and their tokens."""
    prompt = request.prompt
    several: Sequence[str | list[int]] = (
        [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt  # type: ignore[assignment]
    )
    if not several:
        raise invalid("prompt has nothing in it", "prompt")
    served.require_count(len(several), request.n)
    special = request.add_special_tokens is not False
    most = request.truncate_prompt_tokens
    tokens = [
        await served.encode(one, special, any_length=most is not None) if isinstance(one, str) else list(one)
        for one in several
    ]
    prompts = [served.truncated(ids, most) for ids in tokens]
    if not all(prompts):
        raise invalid("a prompt has no tokens; give it some text", "prompt")
    return [one if isinstance(one, str) else None for one in several], prompts


@dataclass
class _Completion:
    served: Served
    request: CompletionRequest
    answers: Answers
    texts: list[str | None]

    def __post_init__(self) -> None:
        as_ids = bool(self.request.return_tokens_as_token_ids)
        count = self.request.logprobs
        self._logprobs = [
            None if count is None else CompletionLogprobs(Texts(self.served, as_ids), count)
            for _ in range(len(self.answers.prompts) * self.answers.n)
        ]
        self._head = dict(
            id=f"cmpl-{uuid.uuid4().hex}",
            object="text_completion",
            created=int(time.time()),
            model=self.served.named(self.request.model),
        )

    def _echo(self, choice: int) -> tuple[str, dict[str, list[Any]] | None]:
        """The text of a choice's prompt and its `logprobs`, where the request has echo."""
        if not self.request.echo:
            return "", None
        number = choice // self.answers.n
        prompt, text, logprobs = self.answers.prompts[number], self.texts[number], self._logprobs[choice]
        values = self.answers.streams[number].prompt_logprobs
        return (
            self.served.decode(prompt) if text is None else text,
            None if logprobs is None or values is None else logprobs.of_prompt(prompt, values),
        )

    @property
    def _answered(self) -> bool:
        """Whether the request wants tokens, and not only the prompt."""
        return self.request.max_tokens != 0

    async def whole(self) -> dict[str, Any]:
        """The response with all choices."""
        count = len(self._logprobs)
        texts, ids = [""] * count, [list[int]() for _ in range(count)]
        parts: list[list[dict[str, list[Any]]]] = [[] for _ in range(count)]
        ends: list[Piece | None] = [None] * count
        try:
            async for piece in self.answers:
                at, logprobs = piece.choice, self._logprobs[piece.choice]
                if not ids[at]:
                    texts[at], echoed = self._echo(at)
                    parts[at] += [echoed] if echoed else []
                ids[at].append(piece.event.token)
                ends[at] = piece
                if self._answered:
                    texts[at] += piece.text
                    parts[at] += [logprobs.of(piece.event)] if logprobs else []
        finally:
            self.answers.close()
        choices = []
        for at, end in enumerate(ends):
            number = at // self.answers.n
            choice: dict[str, Any] = dict(index=at, text=texts[at], logprobs=joined(parts[at]) if parts[at] else None)
            choice |= dict(finish_reason=end and end.finish_reason, stop_reason=end and end.stop_reason)
            if self.request.prompt_logprobs is not None:
                values = self.answers.streams[number].prompt_logprobs or []
                choice["prompt_logprobs"] = prompt_logprobs(self.served, self.answers.prompts[number], values)
            if self.request.return_token_ids:
                choice |= dict(prompt_token_ids=self.answers.prompts[number], token_ids=ids[at])
            choices.append(choice)
        return dict(self._head, choices=choices, usage=self._usage())

    def _usage(self) -> dict[str, Any]:
        usage = self.answers.usage
        if not self._answered:
            usage |= dict(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    async def chunks(self) -> AsyncIterator[str]:
        """The response as server-sent events."""
        options = self.request.stream_options or StreamOptions()
        begun = [False] * len(self._logprobs)
        async for piece in self.answers:
            at, logprobs = piece.choice, self._logprobs[piece.choice]
            text, parts = "", []
            if not begun[at]:
                text, echoed = self._echo(at)
                parts += [echoed] if echoed else []
            if self._answered:
                text += piece.text
                parts += [logprobs.of(piece.event)] if logprobs else []
            shown = text or parts or piece.finish_reason or self.request.return_token_ids
            if shown or options.continuous_usage_stats:
                choice: dict[str, Any] = dict(index=at, text=text, logprobs=joined(parts) if parts else None)
                choice |= dict(finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
                if self.request.return_token_ids:
                    prompt = None if begun[at] else self.answers.prompts[at // self.answers.n]
                    choice |= dict(prompt_token_ids=prompt, token_ids=[piece.event.token])
                yield sse(self._chunk([choice], bool(options.continuous_usage_stats)))
            begun[at] = True
        if options.include_usage:
            yield sse(self._chunk([], True))
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: bool) -> dict[str, Any]:
        return dict(self._head, choices=choices) | (dict(usage=self._usage()) if usage else {})
