"""Which programs prompts go through: in one piece where a context bucket holds them, else in chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jx_neuron.step.buckets import Buckets, fit
from jx_neuron.step.shape import Shape

Rows = Sequence[np.ndarray]


@dataclass(frozen=True)
class Call:
    """One program's inputs: tokens [b, t], where each row starts, and its tokens from there on."""

    tokens_bt: np.ndarray
    start_b: np.ndarray
    length_b: np.ndarray
    slots: int

    def shape(self, candidates: int, all_logits: bool) -> Shape:
        """The program's; one token has its logits in any case."""
        batch, t = self.tokens_bt.shape
        return Shape(batch, t, self.slots, candidates, all_logits and t > 1)

    def inputs(self) -> dict[str, np.ndarray]:
        """What the program takes."""
        return {"tokens_bt": self.tokens_bt, "start_b": self.start_b, "length_b": self.length_b}


def prefill_calls(rows: Rows, buckets: Buckets, held: int = 0, sizes: Sequence[int] | None = None) -> Iterator[Call]:
    """The calls that put whole prompts into a cache. After the last, logits are each row's last token's.

    The cache holds the first `held` tokens of every row already, which must be fewer than the longest has; what follows
    them goes through in chunks of one of `sizes`.

    Every chunk ends within the cache, so one that would not starts earlier and computes some tokens again; a row that
    ended in an earlier chunk computes its last token again.
    """
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    t = fit(buckets.context if sizes is None else sizes, longest - held)
    for first in range(held, longest, t):
        alone = held == 0 and longest <= t and t > 1
        slots = t if alone else buckets.slots(min(first + t, buckets.capacity))
        start_b = np.minimum(np.where(lengths > first, first, lengths - 1), slots - t).astype(np.int32)
        tokens_bt = np.zeros((len(rows), t), np.int32)
        for row, start, into in zip(rows, start_b, tokens_bt, strict=True):
            part = row[start : start + t]
            into[: len(part)] = part
        yield Call(tokens_bt, start_b, (lengths - start_b).astype(np.int32), slots)


def continued_calls(
    tokens_bt: np.ndarray, start_b: np.ndarray, buckets: Buckets, sizes: Sequence[int]
) -> Iterator[Call]:
    """The calls that put tokens [b, t] behind what the cache holds, from each row's `start_b` on.

    They go through in chunks of `sizes`, and must fit the capacity.
    """
    done, length = 0, tokens_bt.shape[1]
    while done < length:
        at_b = (start_b + done).astype(np.int32)
        t = fit([t for t in sizes if t == 1 or int(at_b.max()) + t <= buckets.capacity], length - done)
        chunk_bt = np.zeros((len(tokens_bt), t), np.int32)
        part = tokens_bt[:, done : done + t]
        chunk_bt[:, : part.shape[1]] = part
        yield Call(chunk_bt, at_b, np.full(len(at_b), length - done, np.int32), buckets.slots(int(at_b.max()) + t))
        done += t
