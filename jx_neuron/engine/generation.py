"""Answers to any number of prompts of any lengths: as events, and whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jx_neuron.engine.engine import Engine
from jx_neuron.engine.options import Choice
from jx_neuron.engine.stopping import Detokenizer
from jx_neuron.engine.ticket import Event


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
    """

    ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    seconds_to_first: float
    seconds: float


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


def events(
    engine: Engine, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Choice]], tokenizer: Any
) -> Iterator[Event]:
    """Yields every token of every answer as it is drawn; several answers run at a time.

    choices:   for each prompt, a Choice for each of its answers.
    tokenizer: None for events without text.
    """
    live = [
        (prompt, answer, ticket, Detokenizer(tokenizer, tokens, skip_special_tokens=True) if tokenizer else None)
        for prompt, (tokens, wishes) in enumerate(zip(prompts, choices, strict=True))
        for answer, ticket in enumerate(engine.submit(tokens, wishes, prompt, tokenizer))
    ]
    try:
        while live:
            ready = [entry for entry in live if entry[2].ready]
            if not ready:
                engine.step()
                continue
            for entry in ready:
                prompt, answer, ticket, detokenizer = entry
                event = next(ticket)
                last = event.finish_reason is not None
                text = None if detokenizer is None else detokenizer.add(event.token, last=last)
                if last:
                    live.remove(entry)
                yield replace(event, prompt=prompt, answer=answer, text=text)
    finally:
        for _, _, ticket, _ in live:
            ticket.close()


def whole(prompts: Sequence[Sequence[int]], counts: Sequence[int], stream: Iterator[Event]) -> list[Generation]:
    """Collects events into answers, `counts[i]` for prompt i."""
    events: list[list[list[Event]]] = [[[] for _ in range(count)] for count in counts]
    for event in stream:
        events[event.prompt][event.answer].append(event)
    return [
        Generation(tuple(tokens), tuple(map(_answer, answers))) for tokens, answers in zip(prompts, events, strict=True)
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
    )
