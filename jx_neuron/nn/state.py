"""What a decoder keeps of the sequences that went through it: STATE rows, and the state table that they describe.

A model file declares STATE, a row for each array that every layer keeps. A state table has z slots, each for one
sequence; an array of it is [z, *axes], where the axis s counts positions, and a row without s has one entry a slot,
as recurrent layers have. How arrays lie in memory is a `Layout`'s matter: a backend may have its own.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class S:
    """One row of STATE: `name`, the `axes` of a slot as letters of `Config.sizes`, and how these are split.

    "k s h" keeps an entry of k heads and h numbers for each of s positions.
    """

    name: str
    axes: str
    partition: P = field(default_factory=P)

    @property
    def letters(self) -> list[str]:
        """The axes of a slot."""
        return self.axes.split()

    @property
    def position_axis(self) -> int | None:
        """Which axis of [z, *axes] counts positions; None for a row of one entry a slot."""
        return 1 + self.letters.index("s") if "s" in self.letters else None

    @property
    def split(self) -> P:
        """How [z, *axes] is split: slots are whole on every core."""
        return P(None, *self.partition)


KV = (S("k", "k s h", P("tp")), S("v", "k s h", P("tp")))
"""Keys and values of attention."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["position_bt", "extent_b", "length_b", "slot_b"],
    meta_fields=["positions"],
)
@dataclass(frozen=True)
class Positions:
    """Where the tokens [b, t] of one step stand.

    position_bt: absolute position of each token, int32; those of a row follow each other.
    extent_b:    length of each row's sequence as far as it is known, int32; beyond the tokens of this step where a
                 prompt goes through in chunks.
    length_b:    how many of the t tokens are real, int32; those after are padding. 0 leaves the row's slot as it is.
    slot_b:      each row's slot, int32, all different; None where row i is slot i.
    positions:   how many positions of a slot attention sees, s. A step with s = t begins at position 0.
    """

    position_bt: Array
    extent_b: Array
    length_b: Array
    slot_b: Array | None
    positions: int

    @property
    def start_b(self) -> Array:
        """Position of each row's first token."""
        return self.position_bt[:, 0]

    @property
    def real_bt(self) -> Array:
        """True for real tokens, False for padding."""
        return jnp.arange(self.position_bt.shape[1], dtype=jnp.int32) < self.length_b[:, None]


def positions_of(start_b: Array, length_b: Array, slot_b: Array | None, tokens: int, positions: int) -> Positions:
    """The positions of `tokens` tokens from `start_b` on. `length_b` counts each sequence's tokens from there, which
    may exceed `tokens`."""
    position_bt = start_b[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return Positions(position_bt, start_b + length_b, jnp.minimum(length_b, tokens), slot_b, positions)


Arrays = tuple[tuple[Array, ...], ...]
Shape = Callable[[S, int], tuple[int, ...]]
"""Gives the [z, *axes] of a row of STATE for a number of positions."""


def kept(window: int | None, positions: int) -> int:
    """How many positions a layer keeps of a sequence that may have `positions`."""
    return positions if window is None else min(window, positions)


class Layout:
    """State tables as the chip and several devices have them: for each layer and row of STATE one array [z, *axes].

    `State.arrays` has groups of layers, here one a layer; a layer's place is its group and, where a group's arrays are
    stacked, its index there.
    """

    slot_axis = 0
    stacked = False
    """Whether layers' arrays are stacked, so that a loop may go through the layers."""

    def abstract(
        self, rows: Sequence[S], shape: Shape, windows: Sequence[int | None], positions: int, dtype: Any
    ) -> Arrays:
        """The arrays as shapes, for layers of `windows` and sequences of `positions`."""
        sizes = [kept(window, positions) for window in windows]
        return tuple(tuple(jax.ShapeDtypeStruct(shape(row, size), dtype) for row in rows) for size in sizes)

    def place(self, windows: Sequence[int | None], layer: int) -> tuple[int, int]:
        """The group of a layer, and its index there."""
        return layer, 0

    def position_axis(self, row: S) -> int | None:
        """Which axis of an array counts positions."""
        return row.position_axis

    def read(self, layer: "LayerState", row: int, at: Positions) -> Array:
        """[b, *axes] of the step's slots, of s positions."""
        array, axis = layer.array(row), layer.state.rows[row].position_axis
        if at.slot_b is not None:
            array = jnp.take(array, at.slot_b, axis=0, mode="clip")
        limits = [len(at.length_b), *array.shape[1:]]
        if axis is not None:
            limits[axis] = at.positions
        return lax.slice(array, [0] * array.ndim, limits)  # one slice, which reads nothing else

    def write(self, layer: "LayerState", row: int, new: Array, at: Positions) -> Array:
        """The layer's array with [b, *axes], of t positions, written to the step's slots."""
        array, axis = layer.array(row), layer.state.rows[row].position_axis
        slot_b = jnp.arange(len(new), dtype=jnp.int32) if at.slot_b is None else at.slot_b
        new = new.astype(array.dtype)
        if axis is None:
            real_b = (at.length_b > 0).reshape(-1, *[1] * (new.ndim - 1))
            return array.at[slot_b].set(jnp.where(real_b, new, jnp.take(array, slot_b, axis=0, mode="clip")))
        new, real_bt, start_b = within(new, at, axis, array.shape[axis])
        index = jnp.stack([slot_b, start_b], axis=1)
        window = tuple(range(1, array.ndim))
        old = lax.gather(
            array,
            index,
            lax.GatherDimensionNumbers(window, (0,), (0, axis)),
            (1, *new.shape[1:]),
            mode="promise_in_bounds",
        )
        real = real_bt.reshape(*real_bt.shape[:1], *[-1 if i == axis else 1 for i in range(1, new.ndim)])
        return lax.scatter(
            array,
            index,
            jnp.where(real, new, old),
            lax.ScatterDimensionNumbers(window, (0,), (0, axis)),
            unique_indices=True,
            mode="promise_in_bounds",
        )

    def joined(self, layers: "Sequence[LayerState]") -> "State":
        """One table of each layer's part, where a decoder applied its blocks in a loop of its own."""
        arrays = tuple(part.state.arrays[layer] for layer, part in enumerate(layers))
        return dataclasses.replace(layers[0].state, arrays=arrays)


def within(new: Array, at: Positions, axis: int, positions: int) -> tuple[Array, Array, Array]:
    """A window of t positions that ends within a slot of `positions`: what is new there, what of it is real, and where
    it starts, for `new` [b, …, t, …] with t at `axis`.

    A window that would end beyond starts earlier, with the new entries at its end.
    """
    b, t = at.position_bt.shape
    if t in (1, at.positions):
        return new, at.real_bt, at.start_b
    start_b = jnp.minimum(at.start_b, positions - t)
    from_bt = jnp.arange(t, dtype=jnp.int32) - (at.start_b - start_b)[:, None]
    real_bt = (from_bt >= 0) & (from_bt < at.length_b[:, None])
    index = from_bt.reshape(b, *[t if i == axis else 1 for i in range(1, new.ndim)])
    return jnp.take_along_axis(new, index, axis=axis, mode="clip"), real_bt, start_b


PLAIN = Layout()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "token_z"],
    meta_fields=["rows", "layout", "dtype", "positions", "windows"],
)
@dataclass(frozen=True)
class State:
    """The state table of a model.

    arrays:    as `layout` has them.
    token_z:   the token that each slot drew last, int32 [z].
    dtype:     of what STATE describes.
    positions: how many a sequence may have.
    windows:   how many of the last positions each layer attends to, None for all. A layer keeps no more: where a
               sequence is longer, its array is a ring, and position p lies at p modulo the window.
    """

    arrays: Arrays
    token_z: Array
    rows: tuple[S, ...] = field(metadata=dict(static=True))
    layout: Layout = field(metadata=dict(static=True))
    dtype: Any = field(metadata=dict(static=True))
    positions: int = field(metadata=dict(static=True))
    windows: tuple[int | None, ...] = field(metadata=dict(static=True))

    @classmethod
    def abstract(
        cls,
        rows: Sequence[S],
        shape: Shape,
        slots: int,
        positions: int,
        windows: Sequence[int | None],
        dtype: Any,
        layout: Layout = PLAIN,
    ) -> "State":
        """A table as shapes, for layers of `windows`."""
        token_z: Any = jax.ShapeDtypeStruct((slots,), jnp.int32)
        arrays = layout.abstract(rows, shape, windows, positions, dtype)
        return cls(arrays, token_z, tuple(rows), layout, jnp.dtype(dtype), positions, tuple(windows))

    @property
    def slots(self) -> int:
        """How many sequences have room."""
        return int(self.token_z.shape[0])

    def partition(self) -> "State":
        """How each array is split, in the same tree."""
        arrays: Any = tuple(tuple(row.split for row in self.rows) for _ in self.arrays)
        token_z: Any = P()
        return dataclasses.replace(self, arrays=arrays, token_z=token_z)

    def of_layer(self, layer: int) -> "LayerState":
        """One layer's part."""
        return LayerState(self, self.layout.place(self.windows, layer)[1], layer)

    def of_period(self, number: Array | int, first: int, period: int) -> "LayerState":
        """The part of layer number · period + first, where the layers' windows repeat with that period."""
        _, index = self.layout.place(self.windows, first)
        stride = self.layout.place(self.windows, first + period)[1] - index
        return LayerState(self, number * stride + index, first)

    def resize(self, slots: int, positions: int) -> "State":
        """The same table with room for as many slots and positions, at least what it has."""

        def padded(array: Array, row: S, window: int | None) -> Array:
            widths = [(0, 0)] * array.ndim
            widths[self.layout.slot_axis] = (0, slots - self.slots)
            if (axis := self.layout.position_axis(row)) is not None:
                widths[axis] = (0, kept(window, positions) - array.shape[axis])
            return jnp.pad(array, widths)

        token_z = jnp.pad(self.token_z, (0, slots - self.slots))
        return dataclasses.replace(self._changed(padded, token_z), positions=positions)

    def copy(self, source_n: Array, target_n: Array) -> "State":
        """Slot target_n[i] becomes what slot source_n[i] was."""
        axis = self.layout.slot_axis

        def copied(array: Array, row: S, window: int | None) -> Array:
            sources = [lax.dynamic_slice_in_dim(array, source, 1, axis) for source in source_n]
            for target, source in zip(target_n, sources, strict=True):
                array = lax.dynamic_update_slice_in_dim(array, source, target, axis)
            return array

        return self._changed(copied, self.token_z.at[target_n].set(self.token_z[source_n]))

    def clear(self, slot_n: Array) -> "State":
        """Zeros in the slots `slot_n`."""
        axis = self.layout.slot_axis

        def cleared(array: Array, row: S, window: int | None) -> Array:
            zeros = jnp.zeros_like(lax.slice_in_dim(array, 0, 1, axis=axis))
            for slot in slot_n:
                array = lax.dynamic_update_slice_in_dim(array, zeros, slot, axis)
            return array

        return self._changed(cleared, self.token_z)

    def _changed(self, change: Callable[[Array, S, int | None], Array], token_z: Array) -> "State":
        windows = {self.layout.place(self.windows, i)[0]: window for i, window in enumerate(self.windows)}
        arrays = tuple(
            tuple(change(array, row, windows[group]) for array, row in zip(arrays, self.rows, strict=True))
            for group, arrays in enumerate(self.arrays)
        )
        return dataclasses.replace(self, arrays=arrays, token_z=token_z)

    def __iter__(self) -> "Iterator[LayerState]":
        """Each layer's part; for a decoder with a loop of its own, which gives a tuple of them back."""
        return (self.of_layer(layer) for layer in range(len(self.windows)))


@partial(jax.tree_util.register_dataclass, data_fields=["state", "index"], meta_fields=["layer"])
@dataclass(frozen=True)
class LayerState:
    """One layer's part of a state table.

    index: where the layer lies in the arrays of its group.
    layer: a layer of the same window, by which its group is found.
    """

    state: State
    index: Array | int
    layer: int = field(metadata=dict(static=True))

    def read(self, name: str, at: Positions) -> Array:
        """[b, *axes] of the step's slots. A row that counts positions gives those of `position_bs`."""
        if (size := self._ring(at)) is not None:
            at = dataclasses.replace(at, positions=size)
        return self.state.layout.read(self, self._row(name), at)

    def write(self, at: Positions, **new: Array) -> "LayerState":
        """The state with new entries, by name of the row.

        A row that counts positions takes [b, t, *other axes], as layers make them; any other [b, *axes]. Padding and
        rows without tokens leave what was there.
        """
        layer = self
        for name, array in new.items():
            row = self._row(name)
            axis, entries, place = self.state.rows[row].position_axis, array, at
            if axis is not None:
                entries = jnp.moveaxis(array, 1, axis)
                if (size := self._ring(at)) is not None:
                    entries, place = layer._onto_ring(row, entries, at, axis, size)
            layer = layer._with(row, self.state.layout.write(layer, row, entries, place))
        return layer

    def position_bs(self, at: Positions, *, written: bool) -> Array:
        """Which position each entry that `read` gives is of, negative for none: [1, s], or [b, s] of a ring.

        written: whether the step's tokens are in the state yet.
        """
        if (size := self._ring(at)) is None:
            return jnp.arange(at.positions, dtype=jnp.int32)[None]
        end_b = at.start_b + at.length_b if written else at.start_b
        return _ring_position_bs(end_b, size)

    def is_ring(self, at: Positions) -> bool:
        """Whether the step's sequences may be longer than what the layer keeps of them."""
        return self._ring(at) is not None

    def array(self, row: int) -> Array:
        """The array of a row of STATE, of the layer's group."""
        return self.state.arrays[self._group][row]

    def _ring(self, at: Positions) -> int | None:
        size = kept(self.state.windows[self.layer], self.state.positions)
        return size if size < at.positions else None

    def _onto_ring(self, row: int, new: Array, at: Positions, axis: int, size: int) -> tuple[Array, Positions]:
        """What to write, and where, for [b, …, t, …] to be on the ring."""
        if (t := at.position_bt.shape[1]) == 1:
            return new, dataclasses.replace(at, position_bt=lax.rem(at.position_bt, jnp.int32(size)), positions=size)
        b = len(new)
        index_bs = _ring_position_bs(at.start_b + at.length_b, size) - at.start_b[:, None]  # of this step's tokens

        def along(index_bs: Array) -> Array:
            return index_bs.reshape(b, *[size if i == axis else 1 for i in range(1, new.ndim)])

        whole = Positions(
            jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (b, size)),
            at.extent_b,
            jnp.where(at.length_b > 0, jnp.int32(size), jnp.int32(0)),
            at.slot_b,
            size,
        )
        latest = jnp.take_along_axis(new, along(jnp.clip(index_bs, 0, t - 1)), axis=axis, mode="clip")
        old = self.state.layout.read(self, row, whole).astype(new.dtype)
        return jnp.where(along(index_bs) >= 0, latest, old), whole

    def _with(self, row: int, array: Array) -> "LayerState":
        arrays, group = self.state.arrays, self._group
        changed = (*arrays[group][:row], array, *arrays[group][row + 1 :])
        state = dataclasses.replace(self.state, arrays=(*arrays[:group], changed, *arrays[group + 1 :]))
        return dataclasses.replace(self, state=state)

    @property
    def _group(self) -> int:
        return self.state.layout.place(self.state.windows, self.layer)[0]

    def _row(self, name: str) -> int:
        return [row.name for row in self.state.rows].index(name)


def _ring_position_bs(end_b: Array, size: int) -> Array:
    """The latest position before `end_b` that lies at each place of a ring; negative where there is none."""
    last_b1, place_s = end_b[:, None] - 1, jnp.arange(size, dtype=jnp.int32)
    return last_b1 - lax.rem(last_b1 - place_s + size, jnp.int32(size))


def joined(layers: "State | Sequence[LayerState]") -> State:
    """The state table of what a decoder gives: a State, or each layer's part as it came of one table."""
    if isinstance(layers, State):
        return layers
    return layers[0].state.layout.joined(layers)


Cache, LayerKV, Span = State, LayerState, Positions  # names that decoders of one's own may have been written with
