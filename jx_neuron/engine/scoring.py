"""How likely a model holds given tokens to be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.engine.processors import log_softmax
from jx_neuron.engine.session import Engine, Session
from jx_neuron.util.arguments import integer


@dataclass(frozen=True)
class Score:
    """A text's likelihood.

    log_likelihood: natural logarithm of its tokens' probability after the first, each given those before it.
    tokens:         how many were scored: all but the first.
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
    """A row's tokens after the first: the log-probability of each, float32 [t - 1], and whether it is the likeliest."""

    logprobs: np.ndarray
    likeliest: np.ndarray


@dataclass(frozen=True)
class _Window:
    row: int
    start: int
    scored: int  # the first token that is scored, counted in the row
    tokens: np.ndarray


def summary(parts: Parts) -> Score:
    """The sum of a row's parts."""
    return Score(float(parts.logprobs.sum(dtype=np.float64)), len(parts.logprobs))


def stride_of(stride: Any, capacity: int) -> int:
    """How far apart windows start. Raises InputError where they would leave tokens out."""
    return max(1, capacity // 2) if stride is None else integer("stride", stride, most=capacity)


def log_likelihoods(engine: Engine, rows: Sequence[np.ndarray], stride: int) -> list[Parts]:
    """What the tokens of each row [t] are worth, in batches of rows of like length; `stride` as in `score`."""
    capacity = engine.buckets.capacity
    found = [Parts(np.zeros(len(row) - 1, np.float32), np.zeros(len(row) - 1, bool)) for row in rows]
    windows = [window for number, row in enumerate(rows) for window in _windows(number, row, capacity, stride)]
    windows.sort(key=lambda window: -len(window.tokens))
    most = engine.most_prompts
    for first in range(0, len(windows), most):
        _score(engine, windows[first : first + most], found)
    return found


def _windows(number: int, row: np.ndarray, capacity: int, stride: int) -> list[_Window]:
    windows, scored = [], 1
    for start in range(0, len(row), stride):
        end = min(start + capacity, len(row))
        windows.append(_Window(number, start, max(scored, start + 1), row[start:end]))
        scored = end
        if end == len(row):
            break
    return windows


def _score(engine: Engine, windows: Sequence[_Window], found: Sequence[Parts]) -> None:
    session = Session(engine, [window.tokens for window in windows])
    for call, result in session.prefill_chunks(all_logits=True):
        logits = np.asarray(result.logits_bv)[..., : engine.vocab_size]
        valid_b = np.minimum(call.length_b, call.tokens_bt.shape[1])
        session.require_finite(_finite(logits[: len(windows)], valid_b))
        for window, row, start, valid in zip(windows, logits, call.start_b, valid_b, strict=False):
            logits_tv = row[:valid] if row.ndim == 2 else row[None]
            first = start if row.ndim == 2 else start + valid - 1
            logits_tv = logits_tv[: len(window.tokens) - 1 - first]
            target_t = window.tokens[first + 1 : first + 1 + len(logits_tv)]
            at_t = window.start + first + np.arange(len(target_t))
            chosen = at_t + 1 >= window.scored
            logprobs_t = np.take_along_axis(log_softmax(logits_tv), target_t[:, None], axis=-1)[:, 0]
            parts = found[window.row]
            parts.logprobs[at_t[chosen]] = logprobs_t[chosen]
            parts.likeliest[at_t[chosen]] = (logits_tv.argmax(-1) == target_t)[chosen]


def _finite(logits: np.ndarray, valid_b: np.ndarray) -> np.ndarray:
    """Whether all logits of each row's valid tokens are finite, bool [n]; logits [n, t, v] or [n, v]."""
    rows = (row[:valid] if row.ndim == 2 else row for row, valid in zip(logits, valid_b, strict=False))
    return np.array([np.isfinite(row).all() for row in rows])
