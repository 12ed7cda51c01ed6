"""The equations that backends compute in forms of their own, beside the products of nn/kernel.py.

`Ops` has them as the chip and several devices get them. A backend has a subclass, which `using` names while a program
is traced; the layers call `ops()`. Array suffixes are those of jx_neuron.nn.layers, g query heads of a key head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")


class Ops:
    """Each equation as one operator of XLA, or a few."""

    def once(self, x: T) -> T:
        """x, where a backend would otherwise compute it anew for each of its uses."""
        return x

    def mean(self, x: Array) -> Array:
        """The mean over the last axis, which stays with a size of 1."""
        return x.mean(-1, keepdims=True)

    def matmul_rows(self, x: Array, table_nk: Array) -> Array:
        """x · tableᵀ, over the last axis of both."""
        return jnp.einsum("...k,nk->...n", x, table_nk)

    def matmul_scaled_rows(self, x: Array, codes_nk: Array, scales_n: Array) -> Array:
        """x · tableᵀ of a table of codes, each row times its scale."""
        y = jnp.einsum("...k,nk->...n", x, codes_nk.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * scales_n.astype(jnp.float32)).astype(x.dtype)

    def query_blocks(self, tokens: int, positions: int) -> list[tuple[int, int, int]]:
        """Queries that go through attention at a time: the first, the one after the last, and how many positions are
        read for them."""
        return [(0, tokens, positions)]

    def attention_scores(self, q_btkgh: Array, k_bksh: Array) -> Array:
        """q · kᵀ of each query head with its group's keys: float32 [b, k, g, t, s]."""
        # the keys first: XLA then leaves the scores in their order, where the other way round it transposes them
        return jnp.einsum("bksh,btkgh->bkgts", k_bksh, q_btkgh, preferred_element_type=jnp.float32)

    def attention_values(self, w_bkgts: Array, v_bksh: Array) -> Array:
        """softmax(w) · v of each query head with its group's values: [b, t, k, g, h]; w is float32."""
        p_bkgts = jax.nn.softmax(w_bkgts, axis=-1).astype(v_bksh.dtype)
        return jnp.einsum("bksh,bkgts->btkgh", v_bksh, p_bkgts)

    def experts(self, layer: Any, x_btd: Array, weight_btc: Array, index_btc: Array) -> Array:
        """What the experts [b, t, c] of each token give, times their weights: [b, t, d]; `layer` is an `Experts`.

        The parameters of those chosen are gathered where they are fewer than all.
        """
        few = index_btc.size < layer.count
        return (layer.of_chosen if few else layer.dense)(x_btd, weight_btc, index_btc)


PLAIN = Ops()
_ops: ContextVar[Ops] = ContextVar("ops", default=PLAIN)

ops = _ops.get
"""The table of what is traced."""


@contextmanager
def using(table: Ops) -> Iterator[None]:
    """What is traced in this context computes by `table`."""
    token = _ops.set(table)
    try:
        yield
    finally:
        _ops.reset(token)


barrier = jax.lax.optimization_barrier
