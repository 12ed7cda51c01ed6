"""Rings: the entries of a sequence's last positions. Position p is stored at p modulo their number.

A layer that attends to a window of positions keeps a ring of that size, where sequences may be longer.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jx_neuron.nn.positions import Positions


def kept(window: int | None, positions: int) -> int:
    """How many positions a layer keeps of a sequence that may have `positions`."""
    return positions if window is None else min(window, positions)


def ring_positions(end_b: Array, size: int) -> Array:
    """The latest position before `end_b` at each place of a ring, [b, s]; negative where there is none."""
    last_b1, place_s = end_b[:, None] - 1, jnp.arange(size, dtype=jnp.int32)
    return last_b1 - lax.rem(last_b1 - place_s + size, jnp.int32(size))


def onto_ring(
    new: Array, at: Positions, axis: int, size: int, read: Callable[[Positions], Array]
) -> tuple[Array, Positions]:
    """The entries to write, and their places, that put `new` [b, …, t, …], with t at `axis`, on a ring for `read`."""
    if (t := at.position_bt.shape[1]) == 1:
        position_bt = lax.rem(at.position_bt, jnp.int32(size))
        return new, Positions(position_bt, at.extent_b, at.length_b, at.slot_b, size)
    b = len(new)
    index_bs = ring_positions(at.start_b + at.length_b, size) - at.start_b[:, None]  # of this step's tokens

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
    old = read(whole).astype(new.dtype)
    return jnp.where(along(index_bs) >= 0, latest, old), whole
