"""What bends the logits before a token is drawn, on the host: penalties, biases and bans, row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jx_neuron.util.arguments import FLOAT32


@dataclass(frozen=True)
class Processors:
    """Applied in this order, as HF's `generate` does; arrays are [n], one value a row.

    logit_bias:           added to the logits of these tokens; -inf bans one, whatever comes after.
    repetition_penalty_b: divides positive logits, and multiplies negative ones, of tokens that are in the prompt or the
                          answer (Keskar et al., arXiv:1909.05858); 1 does nothing.
    presence_penalty_b:   subtracted from the logits of tokens that are in the answer; 0 does nothing.
    frequency_penalty_b:  subtracted once for each time that a token is in the answer; 0 does nothing.
    no_repeat_ngram_size: bans tokens that would repeat so many in a row of the prompt or the answer; 0 bans none.
    """

    logit_bias: Mapping[int, float]
    repetition_penalty_b: np.ndarray
    presence_penalty_b: np.ndarray
    frequency_penalty_b: np.ndarray
    no_repeat_ngram_size: int

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return bool(
            self.logit_bias
            or (self.repetition_penalty_b != 1).any()
            or self.presence_penalty_b.any()
            or self.frequency_penalty_b.any()
            or self.no_repeat_ngram_size
        )

    def __call__(
        self, logits_bv: np.ndarray, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """The bent logits, float32 [n, v], given the tokens of each row's prompt and of its answer so far."""
        bent_bv = logits_bv.copy()
        biased, bias = list(self.logit_bias), np.array(list(self.logit_bias.values()), np.float32)
        with np.errstate(over="ignore"):
            bent_bv[:, biased] += bias
            for row, (bent_v, prompt, answer) in enumerate(zip(bent_bv, prompts, answers, strict=True)):
                self._bend(bent_v, row, prompt, answer)
        np.clip(bent_bv, FLOAT32.min, FLOAT32.max, out=bent_bv)
        bent_bv[:, np.array(biased, int)[np.isneginf(bias)]] = -np.inf
        return bent_bv

    def _bend(self, bent_v: np.ndarray, row: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        whole = [*prompt, *answer]
        if (penalty := self.repetition_penalty_b[row]) != 1:
            seen = np.unique(whole)
            bent_v[seen] = np.where(bent_v[seen] < 0, bent_v[seen] * penalty, bent_v[seen] / penalty)
        if answer:
            seen, count = np.unique(answer, return_counts=True)
            bent_v[seen] -= self.presence_penalty_b[row] + self.frequency_penalty_b[row] * count
        if self.no_repeat_ngram_size:
            bent_v[_repeating(whole, self.no_repeat_ngram_size)] = FLOAT32.min


def _repeating(tokens: Sequence[int], size: int) -> list[int]:
    """The tokens that would end an n-gram of `size` that is there already."""
    tail = list(tokens[len(tokens) - size + 1 :])
    ends = range(size - 1, len(tokens)) if len(tokens) >= size else ()
    return [tokens[end] for end in ends if list(tokens[end - size + 1 : end]) == tail]


def log_softmax(logits_bv: np.ndarray) -> np.ndarray:
    """Log-probabilities, float32, over the last axis."""
    shifted = logits_bv - logits_bv.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
