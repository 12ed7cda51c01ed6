"""Buckets: the few fixed lengths that programs are compiled for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jx_neuron.errors import InputError
from jx_neuron.lowering.shape import Shape

SMALLEST = 128
DEFAULT_POSITIONS = 2048


@dataclass(frozen=True)
class Buckets:
    """Lengths of prompts (`context`) and of caches read (`tokens`), ascending; the last of `tokens` is the capacity.

    A prompt longer than the largest context bucket goes through in chunks of it.
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

        Raises InputError for lengths that are not positive, or contexts beyond the capacity.
        """
        if isinstance(n_positions, int):
            powers = (SMALLEST << i for i in range(n_positions.bit_length()))
            tokens = [p for p in powers if p < n_positions] + [n_positions]
        else:
            tokens = sorted(set(n_positions))
        if context_length_estimate is None:
            context = sorted({max(1, size // 2) for size in tokens})
        else:
            context = sorted(set(_as_list(context_length_estimate)))
        for name, sizes in (("n_positions", tokens), ("context_length_estimate", context)):
            if not sizes or any(not isinstance(s, int) or s < 1 for s in sizes):
                raise InputError(f"{name}={sizes} is not legal; it takes a positive integer, or a list of them")
        if context[-1] > tokens[-1]:
            raise InputError(
                f"context_length_estimate={context[-1]} exceeds n_positions={tokens[-1]}; "
                f"choose context lengths up to {tokens[-1]}, or a larger n_positions"
            )
        return cls(tuple(context), tuple(tokens))

    @classmethod
    def within(
        cls,
        most: int | None,
        trained: int | None,
        n_positions: int | Sequence[int] | None,
        context_length_estimate: int | Sequence[int] | None,
    ) -> "Buckets":
        """`of`, for a model that has `most` positions (None for any number), and was `trained` on so many (None where
        nothing says): by default 2048, or the positions it was trained on where they are fewer.

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

    def slots(self, length: int) -> int:
        """The smallest token bucket that holds `length` positions.

        >>> Buckets.of(600).slots(130)
        256
        """
        return fit(self.tokens, length)

    def shapes(self, batch: int, candidates: int) -> list[Shape]:
        """Every program that prompts and answers up to the capacity can call for.

        >>> [shape.name for shape in Buckets.of([64]).shapes(batch=1, candidates=8)]
        ['context32-b1-s32-k8', 'context32-b1-s64-k8', 'decode-b1-s64-k8']
        """
        prefill = [Shape(batch, t, t, candidates) for t in self.context if t > 1]
        chunked = [Shape(batch, self.context[-1], s, candidates) for s in self.tokens if s > self.context[-1] > 1]
        return prefill + chunked + [Shape(batch, 1, s, candidates) for s in self.tokens]


def fit(buckets: Iterable[int], length: int) -> int:
    """The smallest of ascending `buckets` that is at least `length`, or the largest."""
    found = 0
    for found in buckets:
        if found >= length:
            break
    return found


def _as_list(sizes: int | Sequence[int]) -> Sequence[int]:
    return [sizes] if isinstance(sizes, int) else sizes
