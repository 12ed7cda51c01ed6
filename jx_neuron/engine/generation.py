"""Answers to any number of prompts of any lengths: as events, and whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jx_neuron.engine.drafting import Drafter, Drafts
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.options import Choice
from jx_neuron.engine.stopping import Detokenizer
from jx_neuron.engine.ticket import Event, Ticket


@dataclass(frozen=True)
class Answer:
    """One answer.

    ids:              the answer's tokens, with the end token where one ended it.
    text:             the answer's text; None where the model has no tokenizer.
    finish_reason:    "stop" where an end token or a stop string ended it, "length" where it was cut short.
    logprobs:         natural log-probability of each token before sampling parameters apply; None unless requested.
    top_logprobs:     the most likely tokens at each place, most likely first, with their log-probabilities.
    seconds_to_first: from the call to the first token.
    seconds:          from the call to the last token.
    drafts:           how many tokens were drafted and accepted, and in how many steps; None without a drafter.
    """

    ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    seconds_to_first: float
    seconds: float
    drafts: Drafts | None = None


@dataclass(frozen=True)
class Generation:
    """The answers to one prompt, whose tokens are `prompt_ids`."""

    prompt_ids: tuple[int, ...]
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str | None:
        """The text of the first answer."""
        return self.answers[0].text

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of the first answer."""
        return self.answers[0].ids


@dataclass(frozen=True)
class Request:
    """A prompt, and a Choice for each of its answers.

    tokenizer:       None for events without text.
    prompt_logprobs: the number of most likely tokens at each position of the prompt; None for no log-probabilities.
    drafter:         guesses what follows; None for no drafts.
    adapter:         the number of the answers' adapter; 0 for none.
    """

    prompt: Sequence[int]
    choices: Sequence[Choice]
    tokenizer: Any
    prompt_logprobs: int | None = None
    drafter: Drafter | None = None
    adapter: int = 0


class RunningAnswer:
    """An answer that an engine computes: the events of its ticket, with text and the indices of prompt and answer."""

    def __init__(self, ticket: Ticket, request: Request, prompt: int, answer: int):
        tokenizer = request.tokenizer
        self.ticket, self._at = ticket, (prompt, answer)
        self._detokenizer = Detokenizer(tokenizer, request.prompt, skip_special_tokens=True) if tokenizer else None

    def next(self) -> Event:
        """The next event; steps the engine where none is ready. Raises the errors of the answer."""
        event = next(self.ticket)
        text = None
        if self._detokenizer is not None:
            text = self._detokenizer.add(event.token, last=event.finish_reason is not None)
        prompt, answer = self._at
        drafts = None if event.finish_reason is None else self.ticket.drafts
        return replace(event, prompt=prompt, answer=answer, text=text, drafts=drafts)


def start(engine: Engine, request: Request, number: int = 0) -> list[RunningAnswer]:
    """Submits a request, prompt `number` of its call."""
    tickets = engine.submit(
        request.prompt,
        request.choices,
        number,
        request.tokenizer,
        request.prompt_logprobs,
        request.drafter,
        request.adapter,
    )
    return [RunningAnswer(ticket, request, number, answer) for answer, ticket in enumerate(tickets)]


def events(engine: Engine, requests: Sequence[Request]) -> Iterator[Event]:
    """Yields every token of every answer as it is drawn; several answers run at a time."""
    live = [answer for number, request in enumerate(requests) for answer in start(engine, request, number)]
    try:
        while live:
            ready = [answer for answer in live if answer.ticket.ready]
            if not ready:
                engine.step()
                continue
            for answer in ready:
                event = answer.next()
                if event.finish_reason is not None:
                    live.remove(answer)
                yield event
    finally:
        for answer in live:
            answer.ticket.close()


def whole(requests: Sequence[Request], stream: Iterator[Event]) -> list[Generation]:
    """Collects the events of requests into their answers."""
    events: list[list[list[Event]]] = [[[] for _ in request.choices] for request in requests]
    for event in stream:
        events[event.prompt][event.answer].append(event)
    return [
        Generation(tuple(request.prompt), tuple(map(_answer, answers)))
        for request, answers in zip(requests, events, strict=True)
    ]


def _answer(stream: Sequence[Event]) -> Answer:
    scored, last = stream[0].logprob is not None, stream[-1]
    return Answer(
        tuple(event.token for event in stream),
        None if last.text is None else "".join(event.text or "" for event in stream),
        last.finish_reason or "stop",
        tuple(event.logprob or 0.0 for event in stream) if scored else None,
        tuple(event.top for event in stream) if scored else None,
        stream[0].seconds,
        last.seconds,
        last.drafts,
    )
