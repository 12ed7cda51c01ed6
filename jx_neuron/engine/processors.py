"""Logits processors on the host: penalties, biases and bans, applied before a token is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from jx_neuron.util.arguments import FLOAT32


class Constraint(Protocol):
    """The tokens that may follow in one answer, such as those of a `jx_neuron.engine.grammar.Grammar`."""

    def mask_logits(self, logits_v: np.ndarray) -> np.ndarray:
        """Logits float32 [v], -inf for tokens that may not follow."""
        ...

    def accept(self, token: int) -> None:
        """Takes the next token of the answer."""
        ...

    def copy(self) -> Self:
        """A copy in the same state, which goes on alone."""
        ...


@dataclass(frozen=True)
class Processors:
    """Logits processors, applied in this order, as by HF's `generate`.

    logit_bias:           added to the logits of these tokens; -inf bans one, whatever the other processors add.
    repetition_penalty:   divides positive logits, and multiplies negative ones, of tokens that are in the prompt or the
                          answer (Keskar et al., arXiv:1909.05858); 1 does nothing.
    presence_penalty:     subtracted from the logits of tokens that are in the answer; 0 does nothing.
    frequency_penalty:    subtracted once for each time that a token is in the answer; 0 does nothing.
    no_repeat_ngram_size: bans tokens that would repeat an n-gram of prompt or answer; 0 bans none.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0

    @property
    def active(self) -> bool:
        """Whether any processor changes logits."""
        return self != Processors()

    def __call__(self, logits_v: np.ndarray, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Processes logits, float32 [v], given the tokens of the prompt and of the answer so far."""
        logits_v = logits_v.copy()
        biased, bias = list(self.logit_bias), np.array(list(self.logit_bias.values()), np.float32)
        tokens = [*prompt, *answer]
        with np.errstate(over="ignore"):
            logits_v[biased] += bias
            if (penalty := np.float32(self.repetition_penalty)) != 1:
                distinct = np.unique(tokens)
                logits_v[distinct] = np.where(
                    logits_v[distinct] < 0, logits_v[distinct] * penalty, logits_v[distinct] / penalty
                )
            if answer:
                distinct, count = np.unique(answer, return_counts=True)
                penalties = np.float32(self.presence_penalty) + np.float32(self.frequency_penalty) * count
                logits_v[distinct] -= penalties.astype(np.float32)
            if self.no_repeat_ngram_size:
                logits_v[_repeating(tokens, self.no_repeat_ngram_size)] = FLOAT32.min
        np.clip(logits_v, FLOAT32.min, FLOAT32.max, out=logits_v)
        logits_v[np.array(biased, int)[np.isneginf(bias)]] = -np.inf
        return logits_v


def _repeating(tokens: Sequence[int], size: int) -> list[int]:
    """The tokens that would complete a repeated n-gram of `size`."""
    tail = list(tokens[len(tokens) - size + 1 :])
    ends = range(size - 1, len(tokens)) if len(tokens) >= size else ()
    return [tokens[end] for end in ends if list(tokens[end - size + 1 : end]) == tail]


def log_softmax(logits_bv: np.ndarray) -> np.ndarray:
    """Log-probabilities, float32, over the last axis."""
    shifted = logits_bv - logits_bv.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
