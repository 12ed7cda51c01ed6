"""Buckets: the few fixed lengths that programs are compiled for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.util.arguments import integers

SMALLEST = 128
DEFAULT_POSITIONS = 2048
MOST_POSITIONS = 2**24  # the longest context of a published model is 10 M: Llama 4 Scout
MOST_ROWS = 2**16
MOST_BUCKETS = 64


@dataclass(frozen=True)
class Buckets:
    """Bucket sizes, ascending: of prompts (`context`), and of the positions that attention reads (`tokens`).

    The last of `tokens` is the capacity.

    A prompt longer than the largest context bucket is computed in chunks of that size.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(
        cls, n_positions: int | Sequence[int], context_length_estimate: int | Sequence[int] | None = None
    ) -> "Buckets":
        """Buckets as transformers-neuronx chooses them: token buckets are the powers of two from 128 to `n_positions`,
        itself the last; context buckets are half of each. A list of either is taken as it is.

        >>> Buckets.of(600)
        Buckets(context=(64, 128, 256, 300), tokens=(128, 256, 512, 600))

        Raises InputError for what `bucket_sizes` refuses, and for contexts beyond the capacity.
        """
        tokens = bucket_sizes("n_positions", n_positions, MOST_POSITIONS)
        if np.ndim(n_positions) == 0:
            powers = (SMALLEST << i for i in range(tokens[0].bit_length()))
            tokens = (*(p for p in powers if p < tokens[0]), *tokens)
        if context_length_estimate is None:
            context = tuple(sorted({max(1, size // 2) for size in tokens}))
        else:
            context = bucket_sizes("context_length_estimate", context_length_estimate, MOST_POSITIONS)
        if context[-1] > tokens[-1]:
            raise InputError(
                f"context_length_estimate={context[-1]} exceeds n_positions={tokens[-1]}; "
                f"choose context lengths up to {tokens[-1]}, or a larger n_positions"
            )
        return cls(context, tokens)

    @classmethod
    def within(
        cls,
        most: int | None,
        trained: int | None,
        n_positions: int | Sequence[int] | None,
        context_length_estimate: int | Sequence[int] | None,
    ) -> "Buckets":
        """`of`, for a model that has `most` positions (None for any number), and was `trained` on that number (None if
        unknown): by default 2048, or the positions it was trained on where they are fewer.

        Raises InputError also where n_positions exceeds them.
        """
        if n_positions is None:
            n_positions = min(size for size in (DEFAULT_POSITIONS, most, trained) if size is not None)
        buckets = cls.of(n_positions, context_length_estimate)
        if most is not None and buckets.capacity > most:
            raise InputError(
                f"n_positions={buckets.capacity} exceeds the {most} positions that this model has; "
                f"ask for at most {most}"
            )
        return buckets

    @property
    def capacity(self) -> int:
        """The longest sequence, prompt and answer together."""
        return self.tokens[-1]

    def positions(self, length: int, tokens: int = 0) -> int:
        """The smallest token bucket that holds `length` positions, and more than the `tokens` of a step that goes on
        behind others.

        >>> Buckets.of(600).positions(130)
        256
        >>> Buckets.of(600).positions(130, tokens=256)
        512
        """
        return fit(self.tokens, max(length, tokens + 1))

    def programs(self, rows: int, candidates: int) -> list[ProgramKey]:
        """Every program that prompts and answers up to the capacity can call for.

        >>> [key.name for key in Buckets.of([64]).programs(rows=1, candidates=8)]
        ['context32-b1-s32-k8', 'context32-b1-s64-k8', 'decode-b1-s64-k8']
        """
        chunk = self.context[-1]
        prefill = [ProgramKey("prefill", rows, t, t, candidates) for t in self.context if t > 1]
        chunked = [ProgramKey("prefill", rows, chunk, s, candidates) for s in self.tokens if s > chunk > 1]
        return prefill + chunked + [ProgramKey("decode", rows, 1, s, candidates) for s in self.tokens]


def fit(buckets: Iterable[int], length: int) -> int:
    """The smallest of ascending `buckets` that is at least `length`, else the largest."""
    bucket = 0
    for bucket in buckets:
        if bucket >= length:
            break
    return bucket


def powers_of_two(most: int) -> tuple[int, ...]:
    """The powers of two below `most`, and `most`.

    >>> powers_of_two(6)
    (1, 2, 4, 6)
    """
    return (*(1 << i for i in range((most - 1).bit_length())), most)


def bucket_sizes(name: str, value: Any, most: int) -> tuple[int, ...]:
    """One size or several, ascending. Raises InputError unless they are `MOST_BUCKETS` integers or fewer, up to `most`.

    >>> bucket_sizes("batch_size", [4, 1, 4], most=8)
    (1, 4)
    """
    try:
        count: float = len(value)
    except TypeError:
        count = 1
    except OverflowError:  # of a range
        count = math.inf
    if count > MOST_BUCKETS:
        raise InputError(f"{name} has {count} sizes, and each takes programs of its own; give {MOST_BUCKETS} at most")
    return tuple(sorted(set(integers(name, value, most=most))))
