"""The key/value cache: one LayerKV a layer, in a tuple. Its layout is known to this file alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P


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

    def row(buffer_ksh: Array, update_tkh: Array, start: Array) -> Array:
        update_kth = update_tkh.swapaxes(0, 1).astype(buffer_ksh.dtype)
        zero = jnp.zeros_like(start)
        return jax.lax.dynamic_update_slice(buffer_ksh, update_kth, (zero, start, zero))

    rows = jax.vmap(row)
    return LayerKV(rows(kv.k_bksh, k_btkh, start_b), rows(kv.v_bksh, v_btkh, start_b))


def read(kv: LayerKV, slots: int) -> LayerKV:
    """The first `slots` slots."""
    return LayerKV(kv.k_bksh[:, :, :slots], kv.v_bksh[:, :, :slots])


def take(cache: Cache, index_b: Array) -> Cache:
    """A cache whose row b is row `index_b[b]` of this one."""
    return jax.tree.map(lambda x: jnp.take(x, index_b, axis=0, mode="clip"), cache)
