"""A state table as one CPU reads and writes it fastest."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jx_neuron.nn.layout import Arrays, Kept, Layout, S
from jx_neuron.nn.ops import barrier
from jx_neuron.nn.positions import Positions, within
from jx_neuron.runtime.cpu.kernel import from_bits

POSITIONS_LAST = frozenset({"v"})
"""Rows that are summed over positions, and so read fastest with these in the last axis."""

MOST_UNROLLED = 16
"""Rows that are written by an instruction each; more by a loop, since XLA takes half a second for each of them."""


class CpuLayout(Layout):
    """For each row of STATE one array of all layers that keep the same, [l, z, *axes].

    Numbers of fewer than 32 bits are stored as unsigned integers: XLA widens them to do as little as write a part.
    """

    slot_axis = 1
    stacked = True

    def groups(self, layers: Sequence[Kept]) -> list[Kept]:
        return list(dict.fromkeys(layer for layer in layers if layer.own))

    def place(self, layers: Sequence[Kept], layer: int) -> tuple[int, int]:
        kept = replace(layers[layer], own=True)
        # the last of its group that has been
        return self.groups(layers).index(kept), layers[: layer + 1].count(kept) - 1

    def abstract(self, layers: Sequence[Kept], slots: int, positions: int, dtype: Any) -> Arrays:
        def array(group: Kept, row: int) -> Any:
            shape = group.shape(row, slots, positions)
            stored, order = _bits(group.rows[row].stored(dtype)), self._order(group.rows[row])
            return jax.ShapeDtypeStruct((layers.count(group), *(shape[axis] for axis in order)), stored)

        return tuple(tuple(array(group, row) for row in range(len(group.rows))) for group in self.groups(layers))

    def position_axis(self, row: S) -> int | None:
        axis = row.position_axis
        return None if axis is None else 1 + self._order(row).index(axis)

    def _order(self, row: S) -> list[int]:
        """Which axis of [z, *axes] each axis of a layer's array is."""
        order = list(range(1 + len(row.letters)))
        if row.name in POSITIONS_LAST and row.position_axis is not None:
            order.append(order.pop(row.position_axis))
        return order

    def read(self, array: Array, index: Array | int, row: S, at: Positions, dtype: Any) -> Array:
        array = lax.dynamic_index_in_dim(array, index, keepdims=False)
        if at.slot_b is None:
            array = array[: len(at.length_b)]
        else:
            slots = [lax.dynamic_slice_in_dim(array, slot, 1) for slot in at.slot_b]
            array = jnp.concatenate(slots)
        if (axis := self.position_axis(row)) is not None:
            array = lax.slice_in_dim(array, 0, at.positions, axis=axis - 1)
        order = self._order(row)
        return jnp.transpose(from_bits(array, dtype), [order.index(axis) for axis in range(len(order))])

    def write(self, array: Array, index: Array | int, row: S, new: Array, at: Positions, dtype: Any) -> Array:
        """In place, where XLA copies what it fuses with other uses, and widens 16-bit tables whole to write."""
        axis, order, start_b, b = row.position_axis, self._order(row), jnp.zeros_like(at.length_b), len(new)
        real = (at.length_b > 0).reshape(-1, *[1] * (new.ndim - 1))
        if axis is not None:
            new, real_bt, start_b = within(new, at, axis, array.shape[self.position_axis(row) or 0])
            real = real_bt.reshape(b, *[-1 if i == axis else 1 for i in range(1, new.ndim)])
        new, real = (jnp.transpose(x, order) for x in (new.astype(dtype).view(_bits(dtype)), real))
        slot_b = jnp.arange(b, dtype=start_b.dtype) if at.slot_b is None else at.slot_b

        def place(n: Array | int) -> list[Array]:
            start = [jnp.asarray(index, start_b.dtype), slot_b[n], *[jnp.zeros_like(start_b[n])] * (new.ndim - 1)]
            if (position_axis := self.position_axis(row)) is not None:
                start[position_axis] = start_b[n]
            return start

        def entry(n: Array | int) -> Array:
            return lax.dynamic_slice(array, place(n), (1, 1, *new.shape[1:]))[0, 0]

        def put(n: Array | int, table: Array) -> Array:
            return lax.dynamic_update_slice(table, lax.dynamic_slice_in_dim(written, n, 1)[None], place(n))

        # all that was there is read before any row is written, or each row would take a copy of the table
        few = b <= MOST_UNROLLED

        def entries() -> Array:
            return jnp.stack([entry(n) for n in range(b)]) if few else lax.map(entry, jnp.arange(b, dtype=jnp.int32))

        # entries of one position are apart in memory, and reading them takes as long as writing them
        one = at.position_bt.shape[1] == 1
        old = lax.cond(jnp.all(real), lambda: jnp.zeros_like(new), entries) if one else entries()
        written = jnp.where(real, new, old)
        # one row of the table's memory a head, or XLA would keep the order of what makes it, and copy it twice
        written = barrier(written.reshape(*new.shape[:2], -1)).reshape(new.shape)
        table = array
        if few:
            for n in range(b):
                table = put(n, table)
        else:
            table = lax.fori_loop(0, b, put, table)
        return barrier(table)

    def joined(self, layers: Sequence[Kept], tables: Sequence[Arrays]) -> Arrays:
        """A copy: each layer's part comes of a table of its own."""
        warnings.warn(
            "a decoder that applies its blocks in a loop of its own has a CPU copy the state table at every step; "
            "jx_neuron.nn.Layers does not",
            UserWarning,
            stacklevel=2,
        )
        places = [self.place(layers, layer) for layer in range(len(layers))]

        def stacked(group: int, row: int) -> Array:
            return jnp.stack([tables[i][group][row][index] for i, (of, index) in enumerate(places) if of == group])

        return tuple(tuple(stacked(group, row) for row in range(len(rows))) for group, rows in enumerate(tables[0]))


def _bits(dtype: Any) -> Any:
    """The dtype that an array of numbers has in memory."""
    size = jnp.dtype(dtype).itemsize
    return {1: jnp.uint8, 2: jnp.uint16}.get(size, dtype)


CPU = CpuLayout()
