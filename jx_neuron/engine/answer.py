"""The answers to a batch, step by step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jx_neuron.engine.stopping import Criteria, Detokenizer
from jx_neuron.engine.ticket import Event, Ticket


@dataclass(frozen=True)
class Step:
    """One token of each of b rows.

    tokens:         ids [b]; the padding token in a row that has ended before.
    text:           the text that each row gained; None where the model has no tokenizer. A character of several tokens
                    comes with the last of them.
    logprobs:       natural log-probability of each token before sampling parameters apply, float32 [b]; None unless
                    requested.
    top_tokens:     the most likely ids [b, n], most likely first, and
    top_logprobs:   their log-probabilities, float32 [b, n].
    finish_reasons: for each row None while it runs, "stop" once an end token, a stop string or a criterion has ended
                    it, and "length" where it was cut short.
    seconds:        since the prompt was submitted.
    """

    tokens: np.ndarray
    text: tuple[str, ...] | None
    logprobs: np.ndarray | None
    top_tokens: np.ndarray | None
    top_logprobs: np.ndarray | None
    finish_reasons: tuple[str | None, ...]
    seconds: float

    @property
    def ended(self) -> np.ndarray:
        """Which rows have ended, bool [b]."""
        return np.array([reason is not None for reason in self.finish_reasons])


def steps(
    tickets: Sequence[Ticket],
    pad: int,
    texts: Sequence[Detokenizer] | None = None,
    criteria: Criteria | None = None,
    logprobs: int | None = None,
) -> Iterator[Step]:
    """Yields steps until every row has ended.

    texts:    the detokenizer of each row; None for no text.
    criteria: further stopping criteria, on the ids so far.
    logprobs: the number of most likely tokens with log-probabilities in events; None for no log-probabilities.
    """
    began = time.perf_counter()
    reasons: list[str | None] = [None] * len(tickets)
    try:
        while not all(reasons):
            events = [None if reason else next(ticket) for ticket, reason in zip(tickets, reasons, strict=True)]
            tokens = np.array([pad if event is None else event.token for event in events], np.int32)
            met = criteria.met(tokens) if criteria else np.zeros(len(tickets), bool)
            for row, event in enumerate(events):
                if event is not None:
                    reasons[row] = "stop" if met[row] else event.finish_reason
            grown = tuple(
                "" if event is None else text.add(event.token, last=reason is not None)
                for text, event, reason in zip(texts or (), events, reasons, strict=False)
            )
            seconds = time.perf_counter() - began
            likely = _log_probabilities(events, logprobs)
            yield Step(tokens, grown if texts else None, *likely, tuple(reasons), seconds)
    finally:
        for ticket in tickets:
            ticket.close()


def _log_probabilities(
    events: Sequence[Event | None], count: int | None
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Log-probabilities of a step; rows that have ended have 0, and no likely tokens."""
    if count is None:
        return None, None, None
    logprobs_b = np.array([0.0 if event is None else event.logprob for event in events], np.float32)
    if not count:
        return logprobs_b, None, None
    tops = [((0, -np.inf),) * count if event is None else event.top for event in events]
    ids_bn = np.array([[id for id, _ in top] for top in tops])
    return logprobs_b, ids_bn, np.array([[logprob for _, logprob in top] for top in tops], np.float32)
