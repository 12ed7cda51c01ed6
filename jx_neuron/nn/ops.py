"""The equations that backends compute in forms of their own, besides the products of nn/kernel.py.

`Ops` has them as the chip and several devices get them. A backend has a subclass, which `using` names while a program
is traced; the layers call `ops()`. Array suffixes are those of jx_neuron.nn.layers, g query heads of a key head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jx_neuron.nn import blocks, sampling
from jx_neuron.nn.encoded import Entries, codes, scaled
from jx_neuron.nn.lora import OfRows
from jx_neuron.nn.sampling import Sampling

T = TypeVar("T")


@dataclass(frozen=True)
class Ops:
    """Each equation as one operator of XLA, or a few.

    cores: how many the program runs on, each with a part of the weights.
    """

    cores: int = field(default=1, kw_only=True)

    IN_BLOCKS: ClassVar[bool] = True
    """Whether experts compute many tokens in blocks."""

    def once(self, x: T) -> T:
        """x, where a backend would otherwise compute it again for each of its uses."""
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

    def lora(self, x: Array, a: OfRows, b: OfRows, axes: int) -> Array:
        """x · A · B of each row's adapter, [b, t, *outputs], over the last `axes` axes of x, [b, t, *inputs]."""
        inputs = tuple(range(axes))
        over = tuple(n + x.ndim - axes for n in inputs), tuple(n + 1 for n in inputs)
        x_btr = jax.lax.dot_general(x, a.gathered(), (over, ((0,), (0,))))
        return jax.lax.dot_general(x_btr, b.gathered(), (((2,), (1,)), ((0,), (0,))))

    def query_blocks(self, tokens: int, positions: int) -> list[tuple[int, int, int]]:
        """Queries that attention computes at a time: the first, the one after the last, and how many of the positions
        are read for them. The last query is at the last position, or before it."""
        return [(0, tokens, positions)]

    def attention_scores(self, q_btkgh: Array, k_bksh: Entries) -> Array:
        """q · kᵀ of each query head with its group's keys: float32 [b, k, g, t, s]."""
        # the keys first: XLA then leaves the scores in their order, where the other way round it transposes them
        keys_bksh = codes(k_bksh).astype(k_bksh.dtype)
        w_bkgts = jnp.einsum("bksh,btkgh->bkgts", keys_bksh, q_btkgh, preferred_element_type=jnp.float32)
        return scaled(w_bkgts, k_bksh)

    def attention_values(self, w_bkgts: Array, v_bksh: Entries) -> Array:
        """softmax(w) · v of each query head with its group's values: [b, t, k, g, h]; w is float32."""
        p_bkgts = scaled(jax.nn.softmax(w_bkgts, axis=-1), v_bksh).astype(v_bksh.dtype)
        return jnp.einsum("bksh,bkgts->btkgh", codes(v_bksh).astype(v_bksh.dtype), p_bkgts)

    def experts(self, layer: Any, x_btd: Array, weight_btc: Array, index_btc: Array) -> Array:
        """The outputs of the experts [b, t, c] of each token, times their weights: [b, t, d]; `layer` is an `Experts`.

        The parameters of those chosen are gathered where they are fewer than all. Many tokens are computed in
        blocks that share an expert, where that is faster, and others by every expert.
        """
        if index_btc.size < layer.count:
            return layer.of_chosen(x_btd, weight_btc, index_btc)
        b, t, c = index_btc.shape
        if self.IN_BLOCKS and blocks.pay(b * t, c, layer.count, layer.width // self.cores):
            return layer.in_blocks(x_btd, weight_btc, index_btc, self.cores)
        return layer.dense(x_btd, weight_btc, index_btc)

    def sample(self, logits_bv: Array, by: Sampling, count: int, shards: int) -> Array:
        """A token of each row; see `jx_neuron.nn.sampling.sample`."""
        return sampling.sample(logits_bv, by, count, shards)


PLAIN = Ops()
_ops: ContextVar[Ops] = ContextVar("ops", default=PLAIN)

ops = _ops.get
"""The table of what is traced."""


@contextmanager
def using(table: Ops) -> Iterator[None]:
    """Functions that are traced in this context compute with `table`."""
    token = _ops.set(table)
    try:
        yield
    finally:
        _ops.reset(token)


barrier = jax.lax.optimization_barrier
