"""The mesh of a tensor-parallel model, and how axes are padded so that every core holds the same shape."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh

from jx_neuron.errors import InputError

AXIS = "tp"


def request_devices(count: int) -> None:
    """Arranges for JAX to have `count` CPU devices, for code of your own; models need none of it.

    Has no effect once anything has used JAX.
    """
    try:
        if jax.config.jax_num_cpu_devices < count:
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend has started
        pass


def mesh(tp_degree: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over the first `tp_degree` of `devices` (all of JAX's by default).

    Raises InputError where there are fewer.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < tp_degree:
        raise InputError(
            f"tp_degree={tp_degree} needs {tp_degree} devices and JAX has {len(devices)} ({devices[0].platform}); "
            "lower tp_degree, or set JAX_PLATFORMS=cpu, where any degree works"
        )
    return Mesh(np.asarray(devices[:tp_degree]), (AXIS,))


def padded(size: int, tp_degree: int) -> int:
    """The least multiple of `tp_degree` that is at least `size`.

    >>> padded(50257, 8)
    50264
    """
    return math.ceil(size / tp_degree) * tp_degree


@dataclass(frozen=True)
class Padding:
    """Where each entry of each padded axis comes from, for one model at one tensor-parallel degree.

    Query head slot i holds HF head `query[i]` and reads key/value slot i // (len(query) / len(key_value)), which
    holds HF head `key_value[...]`; -1 is a head of zeros. Heads are padded where they do not divide, key/value heads
    are replicated where there are fewer than cores; every other partitioned axis ends in zeros. What is padded meets
    a zero row of the next projection, so it never changes a result.

    >>> Padding({"n": 6, "k": 2, "h": 16, "f": 90, "v": 100}, tp_degree=4).changes
    ('6 query heads as 8', '2 key/value heads replicated to 4', 'an MLP width of 90 as 92')
    """

    sizes: Mapping[str, int]
    tp_degree: int
    layers: Sequence[Mapping[str, int]] = ()
    """The sizes of each layer, where layers have their own."""

    def of(self, layer: int | None) -> "Padding":
        """That of a layer; None for what is no layer's."""
        return self if layer is None or not self.layers else self._by_sizes[tuple(self.layers[layer].items())]

    @cached_property
    def _by_sizes(self) -> dict[tuple[tuple[str, int], ...], "Padding"]:
        return {tuple(sizes.items()): Padding(sizes, self.tp_degree) for sizes in self.layers}

    @property
    def distinct(self) -> list["Padding"]:
        """Those of the layers, without repetition."""
        return [*self._by_sizes.values()] or [self]

    @cached_property
    def key_value(self) -> tuple[int, ...]:
        k, tp = self.sizes["k"], self.tp_degree
        if self._replicated:
            return tuple(head for head in range(k) for _ in range(tp // k + (head < tp % k)))
        return tuple(range(k)) + (-1,) * (padded(k, tp) - k)

    @cached_property
    def query(self) -> tuple[int, ...]:
        group, per_slot = self._group, self._per_slot
        placed = Counter[int]()
        slots: list[int] = []
        for head in self.key_value:
            first = head * group + placed[head]
            heads = [] if head < 0 else list(range(first, min(first + per_slot, (head + 1) * group)))
            placed[head] += len(heads)
            slots += heads + [-1] * (per_slot - len(heads))
        return tuple(slots)

    @property
    def _group(self) -> int:
        return self.sizes["n"] // self.sizes["k"]

    @property
    def _per_slot(self) -> int:
        """Query heads of each key/value head slot."""
        group = self._group
        return math.ceil(group / (self.tp_degree // self.sizes["k"])) if self._replicated else group

    @property
    def _replicated(self) -> bool:
        return self.sizes["k"] < self.tp_degree and self._group > 1

    def size(self, letter: str) -> int:
        """The padded size of an axis; that of a letter which is never partitioned is unchanged."""
        if letter == "n":
            return self.size("k") * self._per_slot
        return padded(self.sizes[letter], self.tp_degree)

    @property
    def changes(self) -> tuple[str, ...]:
        """What is padded or replicated, one phrase each."""
        return tuple(dict.fromkeys(change for padding in self.distinct for change in padding._changes()))

    def _changes(self) -> Iterator[str]:
        n, k = self.sizes["n"], self.sizes["k"]
        if self.size("n") != n:
            yield f"{n} {'' if n == k else 'query '}heads as {self.size('n')}"
        if n != k != self.size("k"):
            yield f"{k} key/value heads {'replicated to' if self._replicated else 'as'} {self.size('k')}"
        for letter, name in {"f": "an MLP width of", "v": "a vocabulary of"}.items():
            if letter in self.sizes and self.size(letter) != self.sizes[letter]:
                yield f"{name} {self.sizes[letter]} as {self.size(letter)}"

    def describe(self, overhead: float) -> str | None:
        """One line on what is padded or replicated and what it costs: `overhead`, a fraction of the parameters.

        None where nothing is.
        """
        if not self.changes:
            return None
        cost = f"{overhead:.1%}" if overhead >= 0.001 else "under 0.1%"
        return f"tp_degree={self.tp_degree} holds {', '.join(self.changes)}: {cost} more weights"

    def require_exact(self) -> None:
        """Raises InputError where heads are padded, naming the degrees at which they are not."""
        for padding in self.distinct:
            if padding._is_exact:
                continue
            n, k = padding.sizes["n"], padding.sizes["k"]
            exact = [str(degree) for degree in range(1, n + 1) if Padding(padding.sizes, degree)._is_exact]
            raise InputError(
                f"tp_degree={self.tp_degree} does not divide the {n} query and {k} key/value heads, and padding them "
                f"was ruled out; degrees that do are {', '.join(exact)}"
            )

    @property
    def _is_exact(self) -> bool:
        return -1 not in (*self.query, *self.key_value)

    def apply(self, array: np.ndarray, axis: int, letter: str) -> np.ndarray:
        """`array` with `axis` laid out and padded."""
        if letter in "nk":
            source = np.asarray(self.query if letter == "n" else self.key_value)
            if np.array_equal(source, np.arange(array.shape[axis])):
                return array
            taken = np.take(array, np.maximum(source, 0), axis=axis)
            shape = [1] * array.ndim
            shape[axis] = len(source)
            return taken * (source >= 0).reshape(shape).astype(array.dtype)
        extra = self.size(letter) - array.shape[axis]
        return np.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)]) if extra else array
