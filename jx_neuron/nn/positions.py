"""The positions of the tokens of a step."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["position_bt", "extent_b", "length_b", "slot_b", "again_b"],
    meta_fields=["positions"],
)
@dataclass(frozen=True)
class Positions:
    """The positions of the tokens [b, t] of one step.

    position_bt: absolute position of each token, int32; the positions of a row are consecutive.
    extent_b:    known length of each row's sequence, int32; more than the tokens of this step if a prompt is computed
                 in chunks.
    length_b:    number of real tokens of the t, int32; the others are padding. 0 leaves the row's slot unchanged.
    slot_b:      each row's slot, int32, all different; None if row i is slot i.
    positions:   number of positions of a slot that attention sees, s. A step with s = t begins at position 0.
    again_b:     whether each row begins where the slot's last step that verified a draft began; None if none does.
    """

    position_bt: Array
    extent_b: Array
    length_b: Array
    slot_b: Array | None
    positions: int
    again_b: Array | None = None

    @property
    def start_b(self) -> Array:
        """Position of each row's first token."""
        return self.position_bt[:, 0]

    def late_b(self, positions: int) -> Array:
        """How many positions too late each row's t tokens begin, padding included, to end within `positions`."""
        return jnp.maximum(self.start_b - (positions - self.position_bt.shape[1]), 0)

    @property
    def real_bt(self) -> Array:
        """True for real tokens, False for padding."""
        return jnp.arange(self.position_bt.shape[1], dtype=jnp.int32) < self.length_b[:, None]


def positions_of(
    start_b: Array, length_b: Array, slot_b: Array | None, tokens: int, positions: int, again_b: Array | None = None
) -> Positions:
    """The positions of `tokens` tokens from `start_b` on. `length_b` counts each sequence's tokens from there, which
    may exceed `tokens`."""
    position_bt = start_b[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return Positions(position_bt, start_b + length_b, jnp.minimum(length_b, tokens), slot_b, positions, again_b)


def within(new: Array, at: Positions, axis: int, positions: int) -> tuple[Array, Array, Array]:
    """A window of t positions that ends within a slot of `positions`: its new entries, which are real, and where it
    starts, for `new` [b, …, t, …] with t at `axis`.

    A window that would end beyond starts earlier, with the new entries at its end.
    """
    b, t = at.position_bt.shape
    if t in (1, at.positions):
        return new, at.real_bt, at.start_b
    late_b = at.late_b(positions)
    from_bt = jnp.arange(t, dtype=jnp.int32) - late_b[:, None]
    real_bt = (from_bt >= 0) & (from_bt < at.length_b[:, None])
    index = from_bt.reshape(b, *[t if i == axis else 1 for i in range(1, new.ndim)])
    return jnp.take_along_axis(new, index, axis=axis, mode="clip"), real_bt, at.start_b - late_b


def later(x_bt: Array, by_b: Array) -> Array:
    """x [b, t, …] with the entries of each row shifted later by its number of tokens: zeros first, the last dropped."""
    t = x_bt.shape[1]
    return _windows(jnp.pad(x_bt, [(0, 0), (t, 0), *[(0, 0)] * (x_bt.ndim - 2)]), t - by_b, t)


def earlier(x_bt: Array, by_b: Array) -> Array:
    """The inverse of `later`, with zeros after the entries that are left."""
    t = x_bt.shape[1]
    return _windows(jnp.pad(x_bt, [(0, 0), (0, t), *[(0, 0)] * (x_bt.ndim - 2)]), by_b, t)


def _windows(x_bt: Array, start_b: Array, size: int) -> Array:
    """`size` tokens of each row, from start_b on."""
    return jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=size))(x_bt, start_b)
