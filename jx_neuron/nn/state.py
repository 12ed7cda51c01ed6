"""The state of sequences between steps: the state table that the STATE rows of a decoder describe.

A model file declares STATE, a row for each array that a layer keeps. A state table has z slots, each for one sequence;
each of its arrays is [z, *axes], where the axis s counts positions, and a row without s has one entry a slot, as
recurrent layers have. A `Layout` decides how arrays are stored in memory; a backend may have its own.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import ConfigError
from jx_neuron.nn.encoded import Encoded, Entries, decoded
from jx_neuron.nn.layout import KV, PLAIN, Arrays, Kept, Layout, S
from jx_neuron.nn.positions import Positions, positions_of
from jx_neuron.nn.ring import kept, onto_ring, ring_positions

__all__ = ["KV", "Cache", "LayerKV", "LayerState", "Positions", "S", "Span", "State", "joined", "positions_of"]

Seen = tuple[dict[str, Entries], Array]
"""Entries that a step's tokens may attend to, [b, *axes] by name of the row, and the position of each as
`LayerState.position_bs` gives it."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "token_z", "passed"],
    meta_fields=["layers", "layout", "dtype", "positions"],
)
@dataclass(frozen=True)
class State:
    """The state table of a model.

    arrays:    as `layout` has them, in groups.
    token_z:   the token that each slot drew last, int32 [z].
    layers:    what each layer keeps.
    dtype:     of rows of STATE that have none of their own.
    positions: how many a sequence may have.
    passed:    within a step, by group: what layers without arrays of their own read, where the group's last layer had
               more to attend to than its ring holds now.
    """

    arrays: Arrays
    token_z: Array
    layers: tuple[Kept, ...] = field(metadata=dict(static=True))
    layout: Layout = field(metadata=dict(static=True))
    dtype: Any = field(metadata=dict(static=True))
    positions: int = field(metadata=dict(static=True))
    passed: Mapping[int, Seen] = field(default_factory=dict)

    @classmethod
    def abstract(
        cls, layers: Sequence[Kept], slots: int, positions: int, dtype: Any, layout: Layout = PLAIN
    ) -> "State":
        """A table as shapes."""
        token_z: Any = jax.ShapeDtypeStruct((slots,), jnp.int32)
        arrays = layout.abstract(layers, slots, positions, dtype)
        return cls(arrays, token_z, tuple(layers), layout, jnp.dtype(dtype), positions)

    @property
    def slots(self) -> int:
        """How many sequences have room."""
        return int(self.token_z.shape[0])

    @property
    def rows(self) -> list[tuple[S, ...]]:
        """The row of STATE of each array, in the same tree."""
        return [group.rows for group in self.layout.groups(self.layers)]

    @property
    def goes_back(self) -> bool:
        """Whether layers keep what was before the slot's last step that verified a draft."""
        return any(row.before in layer.rows for layer in self.layers for row in layer.rows)

    def partition(self) -> "State":
        """How each array is split, in the same tree."""
        arrays: Any = tuple(tuple(row.split for row in rows) for rows in self.rows)
        token_z: Any = P()
        return dataclasses.replace(self, arrays=arrays, token_z=token_z)

    def place(self, layer: int) -> tuple[int, int]:
        """The group of the arrays that a layer reads, and its index there."""
        return _places(self.layout, self.layers)[layer]

    def of_layer(self, layer: int) -> "LayerState":
        """One layer's part."""
        return LayerState(self, self.place(layer)[1], layer, layer)

    def alone(self, layer: int) -> "LayerState":
        """One layer's part, of a table that has nothing else: those of layers that keep the same are alike. For a
        layout that stacks no arrays."""
        group, kept = self.place(layer)[0], dataclasses.replace(self.layers[layer], own=True)
        reader = dataclasses.replace(kept, own=False)
        layers = (kept, reader) if reader in self.layers else (kept,)
        arrays = (self.arrays[group], ())[: len(layers)]
        passed = {0: self.passed[group]} if group in self.passed else {}
        table = dataclasses.replace(self, arrays=arrays, layers=layers, passed=passed)
        return LayerState(table, 0, layer, 0 if self.layers[layer].own else 1)

    def with_alone(self, layer: int, written: "State") -> "State":
        """This table with what was written to the one of `alone`."""
        group = self.place(layer)[0]
        arrays = (*self.arrays[:group], written.arrays[0], *self.arrays[group + 1 :])
        passed = {**self.passed, group: written.passed[0]} if written.passed else self.passed
        return dataclasses.replace(self, arrays=arrays, passed=passed)

    def of_period(self, number: Array | int, first: int, period: int) -> "LayerState":
        """The part of layer number · period + first, where layers repeat with that period."""
        index = self.place(first)[1]
        stride = self.place(first + period)[1] - index
        return LayerState(self, number * stride + index, number * period + first, first)

    def kind(self, layer: int) -> tuple[int, bool]:
        """The group of a layer, and whether it writes there: layers of a kind differ in their index alone."""
        return self.place(layer)[0], self.layers[layer].own

    def repeats(self, period: int, periods: int) -> bool:
        """Whether layers repeat with a period: layers that far apart are of a kind, and at equal distances."""

        def alike(layers: range) -> bool:
            indices = [self.place(layer)[1] for layer in layers]
            return len(set(map(self.kind, layers))) == 1 == len({b - a for a, b in pairwise(indices)})

        return all(alike(range(first, period * periods, period)) for first in range(period))

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

    def with_rows_of(self, table: "State") -> "State":
        """The same table with the rows that `table` has behind those of this one, as zeros."""
        arrays = tuple(
            (*held, *(jnp.zeros(array.shape, array.dtype) for array in arrays[len(held) :]))
            for held, arrays in zip(self.arrays, table.arrays, strict=True)
        )
        return dataclasses.replace(table, arrays=arrays, token_z=self.token_z)

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
        arrays = tuple(
            tuple(change(array, row, group.window) for array, row in zip(arrays, group.rows, strict=True))
            for arrays, group in zip(self.arrays, self.layout.groups(self.layers), strict=True)
        )
        return dataclasses.replace(self, arrays=arrays, token_z=token_z)

    def __iter__(self) -> "Iterator[LayerState]":
        """Each layer's part; for a decoder with a loop of its own, which gives a tuple of them back.

        Raises ConfigError where layers read what others have written.
        """
        if not all(layer.own for layer in self.layers):
            raise ConfigError(
                "Config.own_state has layers that read another's state, and Model applies its blocks in a loop of its "
                "own, in which no layer sees what another wrote; apply them with jx_neuron.nn.Layers"
            )
        return (self.of_layer(layer) for layer in range(len(self.layers)))


@partial(jax.tree_util.register_dataclass, data_fields=["state", "index", "number"], meta_fields=["layer"])
@dataclass(frozen=True)
class LayerState:
    """One layer's part of a state table.

    index:  the layer's place in the arrays of its group.
    number: the layer's number.
    layer:  a layer that keeps the same in the same group.
    """

    state: State
    index: Array | int
    number: Array | int
    layer: int = field(metadata=dict(static=True))

    @property
    def rows(self) -> tuple[S, ...]:
        """The layer's rows of STATE."""
        return self._kept.rows

    def read(self, name: str, at: Positions) -> Array:
        """[b, *axes] of the step's slots. A row that counts positions gives those of `position_bs`; any other zeros
        where a sequence begins, whatever its slot held before."""
        if self._row(name).position_axis is not None:
            return decoded(self._entries(name, at))
        entry = self._read(name, at)
        of_row = -1, *[1] * (entry.ndim - 1)
        if at.again_b is not None:
            entry = jnp.where(at.again_b.reshape(of_row), self._read(self._row(name).before.name, at), entry)
        return jnp.where(at.start_b.reshape(of_row) == 0, jnp.zeros_like(entry), entry)

    def write(self, at: Positions, **new: Array) -> "LayerState":
        """The state with new entries, by name of the row.

        A row that counts positions takes [b, t, *other axes], as layers make them; any other [b, *axes]. Padding and
        rows without tokens leave what was there. Raises ConfigError for a layer without a state of its own.
        """
        entries = {name: self._encoded(name, array) for name, array in new.items()}
        if at.again_b is not None:
            without_s = [row for row in map(self._row, new) if row.position_axis is None]
            entries |= {row.before.name: self.read(row.name, at) for row in without_s}
        return self._with(at, entries)

    def extend(self, at: Positions, **new: Array) -> "tuple[Seen, LayerState]":
        """Writes new entries of rows that count positions, as `write` does. Returns what the step's tokens may attend
        to, as it is stored, and the state written to."""
        entries, t = {name: self._encoded(name, array) for name, array in new.items()}, at.position_bt.shape[1]
        if t == at.positions:  # whole prompts, of which the state has nothing yet
            layer, position_bs = self._with(at, entries), jnp.arange(t, dtype=jnp.int32)[None]
        elif self._overwrites(at):
            seen = {name: self._with_older(name, entry, at) for name, entry in entries.items()}
            position_bs = jnp.concatenate([self.position_bs(at, written=False), at.position_bt], axis=1)
            layer, entries = self._with(at, entries), seen
        else:
            layer = self._with(at, entries)
            entries, position_bs = layer.seen(at, *new)
        if self._overwrites(at) and self._is_read_by_others:
            passed = {**layer.state.passed, self._group: (entries, position_bs)}
            layer = dataclasses.replace(layer, state=dataclasses.replace(layer.state, passed=passed))
        return (entries, position_bs), layer

    def seen(self, at: Positions, *names: str) -> Seen:
        """What the step's tokens may attend to of rows that count positions, as it is stored, once the step's entries
        are written."""
        if self._overwrites(at):
            return self.state.passed[self._group]
        return {name: self._entries(name, at) for name in names}, self.position_bs(at, written=True)

    def position_bs(self, at: Positions, *, written: bool) -> Array:
        """Which position each entry that `read` gives is of, negative for none: [1, s], or [b, s] of a ring.

        written: whether the step's tokens are in the state yet.
        """
        if (size := self._ring(at)) is None:
            return jnp.arange(at.positions, dtype=jnp.int32)[None]
        return ring_positions(at.start_b + at.length_b if written else at.start_b, size)

    def is_ring(self, at: Positions) -> bool:
        """Whether the step's sequences may be longer than what the layer keeps of them."""
        return self._ring(at) is not None

    def _overwrites(self, at: Positions) -> bool:
        """Whether the step's last tokens may take the place of what its first attend to."""
        return self.is_ring(at) and at.position_bt.shape[1] > 1

    def _ring(self, at: Positions) -> int | None:
        size = kept(self._kept.window, self.state.positions)
        return size if size < at.positions else None

    def _encoded(self, name: str, new: Array) -> Entries:
        """New entries as `write` takes them, in the order of the row's axes, and as it stores them."""
        row = self._row(name)
        if row.position_axis is not None:
            new = jnp.moveaxis(new, 1, row.position_axis)
        return Encoded.of(new, row.dtype, self.state.dtype) if row.is_encoded else new

    def _entries(self, name: str, at: Positions) -> Entries:
        """The entries of a row that counts positions, as they are stored."""
        row, size = self._row(name), self._ring(at)
        at = at if size is None else dataclasses.replace(at, positions=size)
        if not row.is_encoded:
            return self._read(name, at)
        scale = None if row.scale is None else self._read(row.scale.name, at)
        return Encoded(self._read(name, at), scale, self.state.dtype)

    def _with_older(self, name: str, new: Entries, at: Positions) -> Entries:
        """The entries before the step, and new ones behind them."""
        axis = self._row(name).position_axis or 0
        return jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis), self._entries(name, at), new)

    def _with(self, at: Positions, new: Mapping[str, Entries]) -> "LayerState":
        """The state with new entries, in the order of each row's axes."""
        if not self._kept.own:
            raise ConfigError("Config.own_state says that this layer has no state of its own, and its block writes one")
        layer = self
        for name, entries in new.items():
            stored = zip(self._row(name).stored_rows, jax.tree.leaves(entries), strict=True)
            for row, array in stored:
                entry, place = array, at
                if (axis := row.position_axis) is not None and (size := self._ring(at)) is not None:
                    entry, place = onto_ring(array, at, axis, size, partial(layer._read, row.name))
                layer = layer._written(row.name, entry, place)
        return layer

    def _read(self, name: str, at: Positions) -> Array:
        state, number = self.state, self._number(name)
        row = self.rows[number]
        return state.layout.read(state.arrays[self._group][number], self.index, row, at, row.stored(state.dtype))

    def _written(self, name: str, new: Array, at: Positions) -> "LayerState":
        state, group, number = self.state, self._group, self._number(name)
        row, arrays = self.rows[number], list(state.arrays[group])
        arrays[number] = state.layout.write(arrays[number], self.index, row, new, at, row.stored(state.dtype))
        groups = (*state.arrays[:group], tuple(arrays), *state.arrays[group + 1 :])
        return dataclasses.replace(self, state=dataclasses.replace(state, arrays=groups))

    @property
    def _kept(self) -> Kept:
        return self.state.layers[self.layer]

    @property
    def _group(self) -> int:
        return self.state.place(self.layer)[0]

    @property
    def _is_read_by_others(self) -> bool:
        return dataclasses.replace(self._kept, own=False) in self.state.layers

    def _number(self, name: str) -> int:
        return [row.name for row in self.rows].index(name)

    def _row(self, name: str) -> S:
        return self.rows[self._number(name)]


@lru_cache(maxsize=256)
def _places(layout: Layout, layers: tuple[Kept, ...]) -> list[tuple[int, int]]:
    return [layout.place(layers, layer) for layer in range(len(layers))]


def joined(layers: "State | Sequence[LayerState]") -> State:
    """The state table after a step, from what a decoder returns: a State, or the parts of the layers in order."""
    if isinstance(layers, State):
        return dataclasses.replace(layers, passed={})
    state = layers[0].state
    arrays = state.layout.joined(state.layers, [layer.state.arrays for layer in layers])
    return dataclasses.replace(state, arrays=arrays)


Cache, LayerKV, Span = State, LayerState, Positions  # names that decoders outside the package may use
