"""Drawing a sequence's tokens: sampling parameters, and a uniform number for each token of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integer, per_row, plain

MIDDLE = 0.5  # the uniform number of deterministic draws


@dataclass(frozen=True)
class Draw:
    """Sampling parameters of one sequence.

    candidates: the number of most likely tokens that programs draw from; 1 is greedy.
    min_p:      keeps tokens at least this probable, relative to the most likely (arXiv:2407.01082).
    min_tokens: the fewest tokens that top-p keeps.
    key:        the key of the sequence's uniform numbers; with None every number is 0.5.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    min_tokens: int
    candidates: int
    key: tuple[int, int] | None

    @property
    def fused(self) -> bool:
        """Whether a program can draw with these parameters; else `choose` draws from its logits."""
        return not (self.min_p or (self.min_tokens > 1 and self.top_p < 1))

    def uniform(self, index: int) -> float:
        """The uniform number of token `index` of the answer, float32 in [0, 1).

        It is a function of the key and the index alone (Philox, Salmon et al., 2011).
        """
        if self.key is None or self.top_k == 1:
            return MIDDLE
        counter = np.random.Philox(key=np.array(self.key, np.uint64), counter=index)
        return float(np.random.Generator(counter).random(dtype=np.float32))

    def choose(self, logits_v: np.ndarray, index: int) -> int:
        """Draws token `index` of the answer from float32 logits, as `jx_neuron.nn.sampling.sample` does; also with
        min_p and min_tokens."""
        token_k = largest(logits_v, self.top_k or len(logits_v))
        with np.errstate(over="ignore"):
            weight_k = np.exp((logits_v[token_k] - logits_v[token_k[0]]) / np.float32(self.temperature))
        before_k = np.cumsum(weight_k) - weight_k
        kept_k = (before_k < np.float32(self.top_p) * weight_k.sum()) | (np.arange(len(weight_k)) < self.min_tokens)
        kept_k &= (weight_k >= np.float32(self.min_p)) & (weight_k > 0)
        weight_k = np.where(kept_k, weight_k, np.float32(0))
        reached = int((np.cumsum(weight_k) <= np.float32(self.uniform(index)) * weight_k.sum()).sum())
        return int(token_k[min(reached, int(kept_k.sum()) - 1)])


def keys(seed: int | Sequence[int] | None, rows: int) -> list[tuple[int, int]]:
    """The key of each row's uniform numbers: a function of the seed and the row, independent of the batch.

    A row with its own seed has the key of the first row with that seed. None draws a seed. Raises InputError for an
    invalid seed.
    """
    entropy = np.random.SeedSequence().entropy if seed is None else seed
    seeds = per_row("seed", entropy, rows, partial(integer, least=0))
    several = isinstance(plain(entropy), Sequence)
    words = [
        np.random.SeedSequence([seed, 0 if several else row]).generate_state(2, np.uint64)
        for row, seed in enumerate(seeds)
    ]
    return [(int(low), int(high)) for low, high in words]


def candidates(top_k: int, vocab_size: int, global_top_k: int, compiled: int | None) -> int:
    """The number of candidates that programs draw from.

    compiled: the number of the compiled programs; None where programs are compiled on demand.

    Raises InputError where the compiled programs have fewer than `top_k` (0 for all tokens).
    """
    needed = vocab_size if top_k == 0 else min(top_k, vocab_size)
    if compiled is not None:
        if needed > compiled:
            requested = "0 (all)" if top_k == 0 else needed
            raise InputError(
                f"top_k={requested} needs more candidates than the {compiled} that the programs were compiled with; "
                f"ask for at most {compiled}, or compile with a larger GenerationConfig(global_top_k=…)"
            )
        return compiled
    if needed == 1:
        return 1
    return min(vocab_size, global_top_k if needed <= global_top_k else 1 << (needed - 1).bit_length())


def largest(x_v: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest of `x_v`, largest first, ties by index."""
    if count < len(x_v):
        at = np.flatnonzero(x_v >= np.partition(x_v, len(x_v) - count)[len(x_v) - count])
        return at[np.argsort(-x_v[at], kind="stable")[:count]]
    return np.argsort(-x_v, kind="stable")
