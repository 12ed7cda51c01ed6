"""Log-likelihoods of given tokens."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.engine.collector import Collector
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.processors import log_softmax
from jx_neuron.engine.sequence import Sequence
from jx_neuron.util.arguments import integer


@dataclass(frozen=True)
class Score:
    """A text's likelihood.

    log_likelihood: sum of the natural log-probabilities of all tokens but the first, each given those before it.
    tokens:         the number of scored tokens: all but the first.
    """

    log_likelihood: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token; NaN for a text of fewer than two.

        >>> Score(log_likelihood=-6.0, tokens=3).perplexity == math.exp(2)
        True
        """
        return math.exp(-self.log_likelihood / self.tokens) if self.tokens else math.nan


@dataclass(frozen=True)
class Parts:
    """Of each token of a row after the first: its log-probability, float32 [t - 1], and whether it is the likeliest."""

    logprobs: np.ndarray
    likeliest: np.ndarray


def summary(parts: Parts) -> Score:
    """The score of a row, by the sum of its tokens."""
    return Score(float(parts.logprobs.sum(dtype=np.float64)), len(parts.logprobs))


def stride_of(stride: Any, capacity: int) -> int:
    """The distance between starts of windows. Raises InputError where windows would skip tokens."""
    return max(1, capacity // 2) if stride is None else integer("stride", stride, most=capacity)


def log_likelihoods(
    engine: Engine, rows: SequenceOf[np.ndarray], stride: int, adapters: SequenceOf[int] | None = None
) -> list[Parts]:
    """The log-probability of each row's tokens [t], by its adapter. Rows of similar length share steps. `stride` is
    that of `score`."""
    capacity = engine.scheduler.buckets.capacity
    parts = [Parts(np.zeros(len(row) - 1, np.float32), np.zeros(len(row) - 1, bool)) for row in rows]
    windows = [window for n, row in enumerate(rows) for window in _windows(engine, n, row, capacity, stride, parts[n])]
    windows.sort(key=lambda window: -len(window.tokens))
    engine.compute(
        [
            Sequence(
                window.tokens.tolist(), every_logits=True, adapter=adapters[window.row] if adapters else 0, sink=window
            )
            for window in windows
        ]
    )
    return parts


class _Window(Collector):
    """A window of a row. Its tokens are scored from `scored` on, an index in the row."""

    def __init__(self, engine: Engine, row: int, start: int, scored: int, tokens: np.ndarray, parts: Parts):
        super().__init__(engine, row, every=True)
        self.row, self.tokens = row, tokens
        self._start, self._scored, self._parts = start, scored, parts

    def add(self, begin: int, logits_tv: np.ndarray) -> None:
        """Scores the tokens that follow those from position `begin` on."""
        logits_tv = logits_tv[: len(self.tokens) - 1 - begin]
        target_t = self.tokens[begin + 1 : begin + 1 + len(logits_tv)]
        at_t = self._start + begin + np.arange(len(target_t))
        chosen = at_t + 1 >= self._scored
        logprobs_t = np.take_along_axis(log_softmax(logits_tv), target_t[:, None], axis=-1)[:, 0]
        self._parts.logprobs[at_t[chosen]] = logprobs_t[chosen]
        self._parts.likeliest[at_t[chosen]] = (logits_tv.argmax(-1) == target_t)[chosen]


def _windows(engine: Engine, number: int, row: np.ndarray, capacity: int, stride: int, parts: Parts) -> list[_Window]:
    windows, scored = [], 1
    for start in range(0, len(row), stride):
        end = min(start + capacity, len(row))
        windows.append(_Window(engine, number, start, max(scored, start + 1), row[start:end], parts))
        scored = end
        if end == len(row):
            break
    return windows
