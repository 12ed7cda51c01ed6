"""How likely a model finds tokens, by its logits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jx_neuron.engine.draw import largest
from jx_neuron.engine.processors import log_softmax


class Likelihood(NamedTuple):
    """How likely a token is, given those before it, before sampling parameters apply.

    logprob: its natural log-probability.
    rank:    its place among the vocabulary's tokens, by their logits; 1 for the most likely.
    top:     the most likely tokens, most likely first, and their log-probabilities.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def likelihood(logits_v: np.ndarray, token: int, count: int) -> Likelihood:
    """The likelihood of a token by logits, float32 [v], with `count` of the most likely tokens."""
    logprobs_v = log_softmax(logits_v)
    most = largest(logprobs_v, count).tolist() if count else []
    rank = 1 + int((logits_v > logits_v[token]).sum())
    return Likelihood(float(logprobs_v[token]), rank, tuple((id, float(logprobs_v[id])) for id in most))


class PromptLikelihoods:
    """The likelihood of each token of a prompt; None for the first, which follows on nothing."""

    def __init__(self, prompt: Sequence[int], count: int):
        self._prompt, self._count = prompt, count
        self.values: list[Likelihood | None] = [None] * len(prompt)

    def add(self, begin: int, logits_tv: np.ndarray) -> None:
        """Takes logits [t, v] of the tokens from position `begin` on."""
        for at, logits_v in enumerate(logits_tv[: len(self._prompt) - 1 - begin], begin + 1):
            self.values[at] = likelihood(logits_v, self._prompt[at], self._count)
