"""How a row's next token is drawn: parameters of each row, and a uniform number per row and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integer, per_row, plain

MIDDLE = 0.5  # the uniform number of every deterministic draw


@dataclass(frozen=True)
class Draw:
    """How each of n rows is drawn from; arrays are [n].

    candidates:   how many of the most likely tokens programs draw from; 1 is greedy.
    min_p_b:      keeps tokens at least this probable, relative to the most likely (arXiv:2407.01082).
    min_tokens_b: how many tokens top-p keeps at least.
    streams:      where each row's uniform numbers come from; None has every one be a half.
    """

    temperature_b: np.ndarray
    top_k_b: np.ndarray
    top_p_b: np.ndarray
    min_p_b: np.ndarray
    min_tokens_b: np.ndarray
    candidates: int
    streams: Sequence[np.random.Generator] | None

    @property
    def fused(self) -> bool:
        """Whether a program can draw so by itself; else `choose` does, from its logits."""
        return not (self.min_p_b.any() or ((self.min_tokens_b > 1) & (self.top_p_b < 1)).any())

    def uniform(self) -> np.ndarray:
        """The next draw's uniform numbers, float32 [n] in [0, 1)."""
        if self.streams is None:
            return np.full(len(self.top_k_b), MIDDLE, np.float32)
        return np.array([stream.random(dtype=np.float32) for stream in self.streams])

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        """The next draw's inputs to a program of `batch` rows."""
        if self.candidates == 1:
            return {}
        given = dict(
            temperature_b=self.temperature_b, top_k_b=self.top_k_b, top_p_b=self.top_p_b, uniform_b=self.uniform()
        )
        return {name: np.pad(array, (0, batch - len(array)), mode="edge") for name, array in given.items()}

    def choose(self, logits_bv: np.ndarray) -> np.ndarray:
        """The next draw's tokens from float32 logits, int32 [n]: what `jx_neuron.nn.sampling.sample` does, and more."""
        by = (self.temperature_b, self.top_k_b, self.top_p_b, self.min_p_b, self.min_tokens_b, self.uniform())
        return np.array([_choose(*row) for row in zip(logits_bv, *by, strict=True)], np.int32)


def idle(batch: int, candidates: int) -> dict[str, np.ndarray]:
    """Inputs to a program whose own choice of tokens is not asked for."""
    if candidates == 1:
        return {}
    one_b = np.ones(batch, np.float32)
    return dict(temperature_b=one_b, top_k_b=one_b.astype(np.int32), top_p_b=one_b, uniform_b=0 * one_b)


def streams(seed: int | Sequence[int] | None, rows: int) -> list[np.random.Generator]:
    """A Philox stream (Salmon et al., 2011) for each row, keyed by the seed and the row, whatever the batch.

    One seed a row keys each as the first row under that seed; None draws a seed. Raises InputError for what is none.
    """
    entropy = np.random.SeedSequence().entropy if seed is None else seed
    keys = per_row("seed", entropy, rows, partial(integer, least=0))
    several = isinstance(plain(entropy), Sequence)
    sequences = [np.random.SeedSequence([key, 0 if several else row]) for row, key in enumerate(keys)]
    return [np.random.Generator(np.random.Philox(sequence)) for sequence in sequences]


def candidates(top_k_b: np.ndarray, vocab_size: int, global_top_k: int, compiled: int | None) -> int:
    """How many candidates programs draw from. `compiled` is the runtime's number, None where it has any.

    Raises InputError where the compiled programs keep fewer than are asked for.
    """
    every = bool((top_k_b == 0).any())
    most = vocab_size if every else min(int(top_k_b.max()), vocab_size)
    if compiled is not None:
        if most > compiled:
            asked = "0 (all)" if every else most
            raise InputError(
                f"top_k={asked} needs more candidates than the {compiled} that the programs were compiled with; "
                f"ask for at most {compiled}, or compile with a larger GenerationConfig(global_top_k=…)"
            )
        return compiled
    if most == 1:
        return 1
    return min(vocab_size, global_top_k if most <= global_top_k else 1 << (most - 1).bit_length())


def largest(x_v: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest of `x_v` are, largest first, ties by place."""
    if count < len(x_v):
        at = np.flatnonzero(x_v >= np.partition(x_v, len(x_v) - count)[len(x_v) - count])
        return at[np.argsort(-x_v[at], kind="stable")[:count]]
    return np.argsort(-x_v, kind="stable")


def _choose(
    logits_v: np.ndarray, temperature: Any, top_k: Any, top_p: Any, min_p: Any, min_tokens: Any, uniform: Any
) -> int:
    token_k = largest(logits_v, int(top_k) or len(logits_v))
    with np.errstate(over="ignore"):
        weight_k = np.exp((logits_v[token_k] - logits_v[token_k[0]]) / temperature)
    before_k = np.cumsum(weight_k) - weight_k
    kept_k = (before_k < top_p * weight_k.sum()) | (np.arange(len(weight_k)) < min_tokens)
    kept_k &= (weight_k >= min_p) & (weight_k > 0)
    weight_k = np.where(kept_k, weight_k, np.float32(0))
    reached = int((np.cumsum(weight_k) <= uniform * weight_k.sum()).sum())
    return int(token_k[min(reached, int(kept_k.sum()) - 1)])
