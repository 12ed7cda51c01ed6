"""The key/value cache: one LayerKV a layer, in a tuple. Its layout is known to this file alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron import products
from jx_neuron.products import barrier, bits, is_for_cpu


class LayerKV(NamedTuple):
    """Keys and values of one layer, each [b, k, s, h]; slot s holds position s of its row."""

    k_bksh: Array
    v_bksh: Array


Cache = tuple[LayerKV, ...]

PARTITION = P(None, "tp", None, None)


def shape(batch: int, heads: int, slots: int, head_dim: int) -> tuple[int, int, int, int]:
    """The shape of a layer's keys, and of its values."""
    return (batch, heads, slots, head_dim)


def slots(cache: Cache) -> int:
    """How many positions the cache holds."""
    return int(cache[0].k_bksh.shape[2])


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` positions."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), cache)


def write(kv: LayerKV, k_btkh: Array, v_btkh: Array, start_b: Array) -> LayerKV:
    """Writes t positions of each row from its `start_b` on; start_b + t must not exceed the slots."""
    k_bkth, v_bkth = (new.swapaxes(1, 2).astype(old.dtype) for old, new in zip(kv, (k_btkh, v_btkh), strict=True))
    if is_for_cpu():
        k_bksh = _put_row_by_row(kv.k_bksh, k_bkth, start_b, 2)
        v_bkhs = _put_row_by_row(kv.v_bksh.swapaxes(2, 3), v_bkth.swapaxes(2, 3), start_b, 3)
        return LayerKV(k_bksh, v_bkhs.swapaxes(2, 3))
    return LayerKV(jax.vmap(_put)(kv.k_bksh, k_bkth, start_b), jax.vmap(_put)(kv.v_bksh, v_bkth, start_b))


def _put(buffer_ksh: Array, new_kth: Array, start: Array) -> Array:
    zero = jnp.zeros_like(start)
    return jax.lax.dynamic_update_slice(buffer_ksh, new_kth, (zero, start, zero))


def _put_row_by_row(buffer: Array, new: Array, start_b: Array, axis: int) -> Array:
    """In place on a CPU, where XLA copies what it fuses with other uses, and widens 16-bit caches whole to write."""
    dtype = buffer.dtype
    # one row of the buffer's memory a head, or XLA would keep the order of what makes it, and copy it twice
    new = barrier(bits(new).reshape(*new.shape[:2], -1)).reshape(new.shape)
    buffer = bits(buffer)
    for row, start in enumerate(start_b):
        at = [jnp.full_like(start, row), *[jnp.zeros_like(start)] * 3]
        at[axis] = start
        buffer = jax.lax.dynamic_update_slice(buffer, new[row : row + 1], at)
    return products.from_bits(barrier(buffer), dtype)


def packed(cache: Cache) -> Cache:
    """The same cache as it lies between programs for a CPU: values as [b, k, h, s], and 16-bit entries as uint16."""
    return tuple(LayerKV(bits(kv.k_bksh), bits(kv.v_bksh).swapaxes(2, 3)) for kv in cache)


def unpacked(cache: Cache, dtype: Any) -> Cache:
    """The inverse of `packed`."""
    wide = jax.tree.map(lambda x: products.from_bits(x, dtype), cache)
    return tuple(LayerKV(k_bksh, v_bkhs.swapaxes(2, 3)) for k_bksh, v_bkhs in wide)


def read(kv: LayerKV, slots: int) -> LayerKV:
    """The first `slots` slots."""
    return LayerKV(kv.k_bksh[:, :, :slots], kv.v_bksh[:, :, :slots])


def take(cache: Cache, index_b: Array) -> Cache:
    """A cache whose row b is row `index_b[b]` of this one."""
    return jax.tree.map(lambda x: jnp.take(x, index_b, axis=0, mode="clip"), cache)
