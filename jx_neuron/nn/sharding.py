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
    """Arranges for JAX to have `count` CPU devices, for code of your own; models do not need it.

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


def spread(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """As many of the devices of each process, `count` in all, in order of processes.

    Raises InputError where that cannot be.
    """
    processes = sorted({device.process_index for device in devices})
    each, rest = divmod(count, len(processes))
    own = [[device for device in devices if device.process_index == process] for process in processes]
    if rest or min(map(len, own)) < each:
        raise InputError(
            f"tp_degree={count} over {len(processes)} processes takes a multiple of {len(processes)}, and {each} "
            f"devices of each; JAX has {', '.join(str(len(devices)) for devices in own)} ({devices[0].platform}). "
            "Where something has used JAX before the model was made, call jx_neuron.request_devices first"
        )
    return [device for devices in own for device in devices[:each]]


def padded(size: int, tp_degree: int) -> int:
    """The least multiple of `tp_degree` that is at least `size`.

    >>> padded(50257, 8)
    50264
    """
    return math.ceil(size / tp_degree) * tp_degree


GROUPS = {"n": "k", "p": "g"}
"""Axes of heads, and of the groups that they are in: query heads of a key/value head, and heads of recurrent layers."""

NAMES = {"n": ("query ", "key/value heads"), "p": ("recurrent ", "groups of recurrent heads")}
"""The names of heads and groups, by the letter of heads."""


@dataclass(frozen=True)
class Heads:
    """Where each of n heads in k groups comes from, at one tensor-parallel degree.

    Slot i of heads holds HF's head `heads[i]` and reads slot i // (len(heads) / len(groups)) of groups, which holds
    HF's group `groups[...]`; -1 is one of zeros. Both are padded where they do not divide, and groups are replicated
    where there are fewer than cores.
    """

    n: int
    k: int
    tp_degree: int

    @cached_property
    def groups(self) -> tuple[int, ...]:
        k, tp = self.k, self.tp_degree
        if self.are_replicated:
            return tuple(group for group in range(k) for _ in range(tp // k + (group < tp % k)))
        return tuple(range(k)) + (-1,) * (padded(k, tp) - k)

    @cached_property
    def heads(self) -> tuple[int, ...]:
        size, per_slot = self.n // self.k, self._per_slot
        placed = Counter[int]()
        slots: list[int] = []
        for group in self.groups:
            first = group * size + placed[group]
            heads = [] if group < 0 else list(range(first, min(first + per_slot, (group + 1) * size)))
            placed[group] += len(heads)
            slots += heads + [-1] * (per_slot - len(heads))
        return tuple(slots)

    @property
    def counts(self) -> tuple[int, int]:
        """How many slots there are for heads and for groups."""
        groups = self.tp_degree if self.are_replicated else padded(self.k, self.tp_degree)
        return groups * self._per_slot, groups

    @property
    def _per_slot(self) -> int:
        """Heads of each slot of a group."""
        size = self.n // self.k
        return math.ceil(size / (self.tp_degree // self.k)) if self.are_replicated else size

    @property
    def are_replicated(self) -> bool:
        """Whether several slots hold one group, with a part of its heads each."""
        return self.k < self.tp_degree and self.n > self.k

    @property
    def are_exact(self) -> bool:
        """Whether none is of zeros."""
        return -1 not in (*self.heads, *self.groups)


@dataclass(frozen=True)
class Padding:
    """Where each entry of each padded axis comes from, for one model at one tensor-parallel degree.

    Heads and their groups are laid out by `Heads`; every other partitioned axis ends in zeros. What is padded meets a
    zero row of the next projection, so it never changes a result.

    >>> Padding({"n": 6, "k": 2, "h": 16, "f": 90, "v": 100}, tp_degree=4).changes
    ('6 query heads to 8', '2 key/value heads by copies to 4', 'an MLP width of 90 to 92')
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

    @property
    def key_value(self) -> tuple[int, ...]:
        return self._heads["n"].groups

    @property
    def query(self) -> tuple[int, ...]:
        return self._heads["n"].heads

    @cached_property
    def _heads(self) -> "dict[str, Heads]":
        """The heads that the model has, by the letter of their axis."""
        return {
            head: Heads(self.sizes[head], self.sizes[group], self.tp_degree)
            for head, group in GROUPS.items()
            if {head, group} <= self.sizes.keys()
        }

    def _slots(self, letter: str) -> tuple[int, ...] | None:
        """Which head or group of HF's each slot of an axis holds, -1 for zeros; None for other axes."""
        heads = self._heads_of(letter)
        return None if heads is None else heads.heads if letter in GROUPS else heads.groups

    def _heads_of(self, letter: str) -> "Heads | None":
        """The heads that an axis of heads or groups is of."""
        return next((heads for head, heads in self._heads.items() if letter in (head, GROUPS[head])), None)

    def size(self, letter: str) -> int:
        """The padded size of an axis; that of a letter which is never partitioned is unchanged."""
        if (heads := self._heads_of(letter)) is not None:
            return heads.counts[0 if letter in GROUPS else 1]
        return padded(self.sizes[letter], self.tp_degree)

    @property
    def changes(self) -> tuple[str, ...]:
        """The sizes that are padded or replicated, one phrase each."""
        return tuple(dict.fromkeys(change for padding in self.distinct for change in padding._changes()))

    def _changes(self) -> Iterator[str]:
        for letter, heads in self._heads.items():
            n, k, (kind, groups), (n_slots, k_slots) = heads.n, heads.k, NAMES[letter], heads.counts
            if n_slots != n:
                yield f"{n} {kind if letter != 'n' or n != k else ''}heads to {n_slots}"
            if n != k != k_slots:
                yield f"{k} {groups} {'by copies ' if heads.are_replicated else ''}to {k_slots}"
        for letter, name in {"f": "an MLP width of", "v": "a vocabulary of"}.items():
            if letter in self.sizes and self.size(letter) != self.sizes[letter]:
                yield f"{name} {self.sizes[letter]} to {self.size(letter)}"

    def describe(self, overhead: float) -> str | None:
        """One line on the sizes that are padded or replicated, and their cost: `overhead`, a fraction of parameters.

        None if there are none.
        """
        if not self.changes:
            return None
        cost = f"{overhead:.1%}" if overhead >= 0.001 else "under 0.1%"
        return f"tp_degree={self.tp_degree} pads {', '.join(self.changes)}: {cost} more weights"

    def require_exact(self) -> None:
        """Raises InputError where heads are padded, naming the degrees at which they are not."""
        for padding in self.distinct:
            for letter, heads in padding._heads.items():
                if heads.are_exact:
                    continue
                n, k, (kind, groups) = heads.n, heads.k, NAMES[letter]
                exact = [str(degree) for degree in range(1, n + 1) if Heads(n, k, degree).are_exact]
                raise InputError(
                    f"tp_degree={self.tp_degree} does not divide the {n} {kind}and {k} {groups}, and padding them "
                    f"was ruled out; degrees that do are {', '.join(exact)}"
                )

    def apply(self, array: np.ndarray, axis: int, letter: str) -> np.ndarray:
        """`array` with `axis` laid out and padded."""
        if (slots := self._slots(letter)) is not None:
            source = np.asarray(slots)
            if np.array_equal(source, np.arange(array.shape[axis])):
                return array
            taken = np.take(array, np.maximum(source, 0), axis=axis)
            shape = [1] * array.ndim
            shape[axis] = len(source)
            return taken * (source >= 0).reshape(shape).astype(array.dtype)
        extra = self.size(letter) - array.shape[axis]
        return np.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)]) if extra else array
