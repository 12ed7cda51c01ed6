"""The state that layers keep of sequences, STATE rows, and how their arrays are stored in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import ConfigError
from jx_neuron.nn.encoded import StateDtype
from jx_neuron.nn.positions import Positions, within
from jx_neuron.nn.ring import kept
from jx_neuron.nn.sharding import Padding

Arrays = tuple[tuple[Array, ...], ...]


@dataclass(frozen=True)
class S:
    """One row of STATE: `name`, the `axes` of a slot as letters of `Config.sizes`, and how these are split.

    "k s h" keeps an entry of k heads and h numbers for each of s positions. `of` is the type of the layers that have
    the row, as `Config.types` gives it; None for all layers. Rows of different types may have the same name.
    `dtype` is that of its numbers, "float32" where sums of many steps would lose precision in 16 bits; None for the
    state table's. A row that counts positions may be stored in fewer bits (jx_neuron.nn.encoded).
    """

    name: str
    axes: str
    partition: P = field(default_factory=P)
    of: str | None = None
    dtype: StateDtype | None = None

    def encoded(self, dtype: StateDtype) -> "S":
        """The row with entries stored in `dtype`, where it counts positions and has no dtype yet; else as it is.

        Raises ConfigError where int8 would have a scale for each number.
        """
        if self.position_axis is None or self.dtype is not None:
            return self
        if dtype == "int8" and self.letters[-1] == "s":
            raise ConfigError(f"{self} cannot be stored in int8, whose scales are those of vectors along the last axis")
        return replace(self, dtype=dtype)

    @property
    def is_encoded(self) -> bool:
        """Whether its entries are stored in fewer bits than they are computed with."""
        return self.dtype not in (None, "float32")

    @property
    def scale(self) -> "S | None":
        """The row of its scales, where it has some."""
        if self.dtype != "int8":
            return None
        *letters, _ = self.letters
        return S(f"{self.name}.scale", " ".join(letters), P(*self.partition[: len(letters)]), self.of, "float32")

    @property
    def before(self) -> "S":
        """For a row of one entry a slot: the row of what that was before the slot's last step that verified a draft."""
        return replace(self, name=f"{self.name}.before")

    @property
    def stored_rows(self) -> "tuple[S, ...]":
        """The row, and that of its scales."""
        return (self,) if self.scale is None else (self, self.scale)

    def stored(self, dtype: Any) -> np.dtype[Any]:
        """The dtype of its numbers in a state table of `dtype`."""
        return jnp.dtype(self.dtype or dtype)

    @property
    def letters(self) -> list[str]:
        """The axes of a slot."""
        return self.axes.split()

    @property
    def position_axis(self) -> int | None:
        """Which axis of [z, *axes] counts positions; None for a row of one entry a slot."""
        return 1 + self.letters.index("s") if "s" in self.letters else None

    def padded(self, padding: Padding) -> tuple[int, ...]:
        """The sizes of a slot's axes, padded where they are split; 0 for positions."""
        split = (*self.partition, *[None] * len(self.letters))
        sizes = {**padding.sizes, "s": 0}
        return tuple(padding.size(c) if axis else sizes[c] for c, axis in zip(self.letters, split, strict=False))

    @property
    def split(self) -> P:
        """How [z, *axes] is split: slots are whole on every core."""
        return P(None, *self.partition)


KV = (S("k", "k s h", P("tp")), S("v", "k s h", P("tp")))
"""Keys and values of attention."""


@dataclass(frozen=True)
class Kept:
    """The state of a sequence in a layer. Layers with the same state are alike.

    rows:   of STATE.
    sizes:  of the axes of each row, padded; 0 for positions.
    window: how many of the last positions the layer attends to, None for all. It keeps no more: where a sequence is
            longer, its array is a ring, and position p is stored at p modulo the window.
    own:    whether the layer has arrays. One that has none reads those of the last layer before it that is otherwise
            alike.
    """

    rows: tuple[S, ...]
    sizes: tuple[tuple[int, ...], ...]
    window: int | None = None
    own: bool = True

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.sizes, self.window, self.own))

    def shape(self, row: int, slots: int, positions: int) -> tuple[int, ...]:
        """[z, *axes] of a row, for sequences of `positions`."""
        size = kept(self.window, positions)
        letters = self.rows[row].letters
        return (slots, *(size if c == "s" else n for c, n in zip(letters, self.sizes[row], strict=True)))


class Layout:
    """State tables as the chip and several devices have them: for each layer and row of STATE one array [z, *axes].

    Arrays come in groups, here one of each layer. A layer's place is its group and, where the arrays of a group's
    layers are stacked, its index there.
    """

    slot_axis = 0
    stacked = False
    """Whether layers' arrays are stacked, so that a loop may go through the layers."""

    def groups(self, layers: Sequence[Kept]) -> list[Kept]:
        """The state of the layers of each group."""
        return [layer if layer.own else Kept((), ()) for layer in layers]

    def place(self, layers: Sequence[Kept], layer: int) -> tuple[int, int]:
        """The group of a layer, and its index there: of the layer whose arrays it reads."""
        return owner(layers, layer), 0

    def abstract(self, layers: Sequence[Kept], slots: int, positions: int, dtype: Any) -> Arrays:
        """The arrays as shapes, for sequences of `positions`."""
        return tuple(
            tuple(
                jax.ShapeDtypeStruct(group.shape(number, slots, positions), row.stored(dtype))
                for number, row in enumerate(group.rows)
            )
            for group in self.groups(layers)
        )

    def position_axis(self, row: S) -> int | None:
        """Which axis of an array counts positions."""
        return row.position_axis

    def read(self, array: Array, index: Array | int, row: S, at: Positions, dtype: Any) -> Array:
        """[b, *axes] of the step's slots, of s positions, of the layer at `index`."""
        if at.slot_b is not None:
            array = jnp.take(array, at.slot_b, axis=0, mode="clip")
        limits = [len(at.length_b), *array.shape[1:]]
        if (axis := row.position_axis) is not None:
            limits[axis] = at.positions
        return lax.slice(array, [0] * array.ndim, limits)  # one slice, which reads nothing else

    def write(self, array: Array, index: Array | int, row: S, new: Array, at: Positions, dtype: Any) -> Array:
        """`array` with [b, *axes], of t positions, written to the step's slots of the layer at `index`."""
        axis = row.position_axis
        slot_b = jnp.arange(len(new), dtype=jnp.int32) if at.slot_b is None else at.slot_b
        new = new.astype(array.dtype)
        if axis is None:
            real_b = (at.length_b > 0).reshape(-1, *[1] * (new.ndim - 1))
            return array.at[slot_b].set(jnp.where(real_b, new, jnp.take(array, slot_b, axis=0, mode="clip")))
        new, real_bt, start_b = within(new, at, axis, array.shape[axis])
        place = jnp.stack([slot_b, start_b], axis=1)
        window = tuple(range(1, array.ndim))
        old = lax.gather(
            array,
            place,
            lax.GatherDimensionNumbers(window, (0,), (0, axis)),
            (1, *new.shape[1:]),
            mode="promise_in_bounds",
        )
        real = real_bt.reshape(*real_bt.shape[:1], *[-1 if i == axis else 1 for i in range(1, new.ndim)])
        return lax.scatter(
            array,
            place,
            jnp.where(real, new, old),
            lax.ScatterDimensionNumbers(window, (0,), (0, axis)),
            unique_indices=True,
            mode="promise_in_bounds",
        )

    def joined(self, layers: Sequence[Kept], tables: Sequence[Arrays]) -> Arrays:
        """Of each layer's table that layer's arrays, where a decoder applied its blocks in a loop of its own."""
        return tuple(table[layer] for layer, table in enumerate(tables))


def owner(layers: Sequence[Kept], layer: int) -> int:
    """The layer whose arrays `layer` reads: itself, or the last one before it that is alike and has some."""
    own = replace(layers[layer], own=True)
    return next(i for i in range(layer, -1, -1) if layers[i] == own)


PLAIN = Layout()
