"""The key/value cache: one LayerKV a layer, in a tuple, or a Stack. Its layout is known to this file alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.nn.ops import barrier, bits, from_bits


class LayerKV(NamedTuple):
    """Keys and values of one layer, each [b, k, s, h]; slot s holds position s of its row."""

    k_bksh: Array
    v_bksh: Array


@partial(jax.tree_util.register_dataclass, data_fields=["k_lbksh", "v_lbkhs"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Stack:
    """The cache in programs for a CPU: keys of all layers in one array, and values in another, as `bits`."""

    k_lbksh: Array
    v_lbkhs: Array
    dtype: Any = field(metadata=dict(static=True))

    @classmethod
    def of(cls, cache: "tuple[LayerKV, ...]") -> "Stack":
        """The same cache as one: a copy of it."""
        k_lbksh, v_lbksh = (jnp.stack([bits(of) for of in side]) for side in zip(*cache, strict=True))
        return cls(k_lbksh, v_lbksh.swapaxes(3, 4), cache[0].k_bksh.dtype)

    def __iter__(self) -> Iterator[LayerKV]:
        return (read(Part(self, layer), self.k_lbksh.shape[3]) for layer in range(len(self.k_lbksh)))


class Part(NamedTuple):
    """One layer's part of a Stack."""

    stack: Stack
    layer: Array | int


Cache = tuple[LayerKV, ...] | Stack

KV = TypeVar("KV", LayerKV, Part)

MOST_UNROLLED = 16
"""Rows that are written by an instruction each; more by a loop, since XLA takes half a second for each of them."""

PARTITION = P(None, "tp", None, None)


def shape(batch: int, heads: int, slots: int, head_dim: int) -> tuple[int, int, int, int]:
    """The shape of a layer's keys, and of its values."""
    return (batch, heads, slots, head_dim)


def batch(cache: Cache) -> int:
    """How many rows the cache holds."""
    return int(cache.k_lbksh.shape[1] if isinstance(cache, Stack) else cache[0].k_bksh.shape[0])


def slots(cache: Cache) -> int:
    """How many positions the cache holds."""
    return int(cache.k_lbksh.shape[3] if isinstance(cache, Stack) else cache[0].k_bksh.shape[2])


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` positions."""

    def padded(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, slots - size if at == axis else 0) for at, size in enumerate(x.shape)])

    if isinstance(cache, Stack):
        return Stack(padded(cache.k_lbksh, 3), padded(cache.v_lbkhs, 4), cache.dtype)
    return jax.tree.map(lambda x: padded(x, 2), cache)


def write(kv: KV, k_btkh: Array, v_btkh: Array, start_b: Array) -> KV:
    """Writes t positions of each row from its `start_b` on; start_b + t must not exceed the slots."""
    if isinstance(kv, Part):
        return Part(_written(kv, k_btkh, v_btkh, start_b), kv.layer)
    k_bkth, v_bkth = (new.swapaxes(1, 2).astype(old.dtype) for old, new in zip(kv, (k_btkh, v_btkh), strict=True))
    return LayerKV(jax.vmap(_put)(kv.k_bksh, k_bkth, start_b), jax.vmap(_put)(kv.v_bksh, v_bkth, start_b))


def _put(buffer_ksh: Array, new_kth: Array, start: Array) -> Array:
    zero = jnp.zeros_like(start)
    return jax.lax.dynamic_update_slice(buffer_ksh, new_kth, (zero, start, zero))


def _written(kv: Part, k_btkh: Array, v_btkh: Array, start_b: Array) -> Stack:
    """In place on a CPU, where XLA copies what it fuses with other uses, and widens 16-bit caches whole to write."""

    def put(buffer: Array, new: Array, axis: int) -> Array:
        new = bits(new.astype(kv.stack.dtype))
        # one row of the buffer's memory a head, or XLA would keep the order of what makes it, and copy it twice
        new = barrier(new.reshape(*new.shape[:2], -1)).reshape(1, *new.shape)

        def put_row(row: Array | int, buffer: Array) -> Array:
            at = [jnp.asarray(of, start_b.dtype) for of in (kv.layer, row, 0, 0, 0)]
            at[axis] = start_b[row]
            return jax.lax.dynamic_update_slice(buffer, jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1), at)

        if len(start_b) > MOST_UNROLLED:
            return barrier(jax.lax.fori_loop(0, len(start_b), put_row, buffer))
        for row in range(len(start_b)):
            buffer = put_row(row, buffer)
        return barrier(buffer)

    k_lbksh = put(kv.stack.k_lbksh, k_btkh.swapaxes(1, 2), 3)
    return Stack(k_lbksh, put(kv.stack.v_lbkhs, v_btkh.transpose(0, 2, 3, 1), 4), kv.stack.dtype)


def read(kv: LayerKV | Part, slots: int) -> LayerKV:
    """The first `slots` slots."""
    if not isinstance(kv, Part):
        return LayerKV(kv.k_bksh[:, :, :slots], kv.v_bksh[:, :, :slots])
    k_bksh, v_bkhs = (
        jax.lax.dynamic_index_in_dim(of, kv.layer, keepdims=False) for of in (kv.stack.k_lbksh, kv.stack.v_lbkhs)
    )
    k_bksh, v_bkhs = (from_bits(part, kv.stack.dtype) for part in (k_bksh[:, :, :slots], v_bkhs[..., :slots]))
    return LayerKV(k_bksh, v_bkhs.swapaxes(2, 3))


def take(cache: Cache, index_b: Array) -> Cache:
    """A cache whose row b is row `index_b[b]` of this one."""
    axis = int(isinstance(cache, Stack))
    return jax.tree.map(lambda x: jnp.take(x, index_b, axis=axis, mode="clip"), cache)
