"""The equations of jx_neuron.nn.ops as one CPU computes them fastest (docs/notes/cpu-decode.md and cpu-prefill.md)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jx_neuron.nn.encoded import Entries, codes, decoded, scaled
from jx_neuron.nn.ops import Ops, barrier
from jx_neuron.nn.quantized import Form
from jx_neuron.nn.sampling import Sampling
from jx_neuron.runtime.cpu import sampling
from jx_neuron.runtime.cpu.codes import matmul_codes
from jx_neuron.runtime.cpu.kernel import FEW, Formulation, matmul_packed, sums, to_bits, widen

BLOCK = 128
"""Queries that attention computes at a time, where later positions can be left out."""

MOST_ROWS = 128
"""Rows that an expert computes at a time."""

LANES = 32
"""A mean is of as many sums side by side, as torch's: a number that outweighs the rest then rounds few of them off."""

STREAMS = {True: 4, False: 2}
"""Parts of the values that are read side by side, where queries are FEW / 2 at most, and where they are more."""

T = TypeVar("T")


@dataclass(frozen=True)
class CpuOps(Ops):
    """Reductions that read once what several results share, and barriers where XLA would compute or copy again."""

    formulation: Formulation
    of_codes: Formulation | None = None

    def once(self, x: T) -> T:
        return barrier(x)

    def mean(self, x: Array) -> Array:
        lanes = math.gcd(x.shape[-1], LANES)
        if lanes == 1:
            return super().mean(x)
        in_lanes = barrier(x.reshape(*x.shape[:-1], -1, lanes).sum(-2))  # or XLA would join both sums
        return in_lanes.sum(-1, keepdims=True) / x.shape[-1]

    def matmul_rows(self, x: Array, table_nk: Array) -> Array:
        # XLA would widen a 16-bit table once, whole, for this and for its use as an embedding
        alone_nk = to_bits(barrier(table_nk))
        y_mn = matmul_packed(x.reshape(-1, x.shape[-1]), alone_nk, table_nk.dtype, self.formulation)
        return y_mn.reshape(*x.shape[:-1], -1)

    def matmul_scaled_rows(self, x: Array, codes_nk: Array, scales_n: Array) -> Array:
        alone_nk = barrier(codes_nk)
        y_mn = matmul_codes(
            x.reshape(-1, x.shape[-1]), alone_nk, [scales_n], Form("int8", 1), self.of_codes or self.formulation
        )
        return y_mn.reshape(*x.shape[:-1], -1).astype(x.dtype)

    def query_blocks(self, tokens: int, positions: int) -> list[tuple[int, int, int]]:
        """A block sees no positions after its last query."""
        ends = [*range(BLOCK, tokens, BLOCK), tokens]
        return [(first, end, positions - tokens + end) for first, end in zip([0, *ends], ends, strict=False)]

    def attention_scores(self, q_btkgh: Array, k_bksh: Entries) -> Array:
        b, t, k, g, h = q_btkgh.shape
        if g * t <= FEW:
            w_bkrs = _matmul_few(widen(q_btkgh).transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h), _codes(k_bksh))
            return scaled(w_bkrs.reshape(b, k, g, t, -1), k_bksh)
        keys_bksh = decoded(k_bksh)
        if self.formulation.dot == "ynnpack":  # which takes 16 bits with what is contracted last, and widens others
            w_bkrs = _dot(q_btkgh.transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h), keys_bksh, 3, 3)
        else:  # tokens last, as products leave them
            w_bkrs = _dot(widen(q_btkgh).transpose(0, 2, 4, 3, 1).reshape(b, k, h, g * t), widen(keys_bksh), 2, 3)
        return w_bkrs.reshape(b, k, g, t, -1)

    def attention_values(self, w_bkgts: Array, v_bksh: Entries) -> Array:
        if v_bksh.dtype.itemsize == 4:  # the sum divides the result, which is smaller than the weights
            e_bkgts = jnp.exp(w_bkgts - w_bkgts.max(-1, keepdims=True))
            return self._weighted(e_bkgts, v_bksh) / jnp.moveaxis(e_bkgts.sum(-1), 3, 1)[..., None]
        p_bkgts = jax.nn.softmax(w_bkgts, axis=-1).astype(v_bksh.dtype)
        return self._weighted(p_bkgts, v_bksh).astype(v_bksh.dtype)

    def sample(self, logits_bv: Array, by: Sampling, count: int, shards: int) -> Array:
        if logits_bv.shape[-1] <= sampling.SMALL:
            return super().sample(logits_bv, by, count, shards)
        return sampling.sample(logits_bv, by, count)

    def experts(self, layer: Any, x_btd: Array, weight_btc: Array, index_btc: Array) -> Array:
        """A block of rows at a time that share an expert: those chosen are read, and no others.

        Each token has a row for each of its experts, and rows are sorted by these. A block that runs into the rows of
        the next expert is wrong there, until the blocks after it are written.
        """
        b, t, d = x_btd.shape
        c, rows = index_btc.shape[-1], index_btc.size
        size = min(b * t, max(FEW // 2, 1 << (rows // layer.count).bit_length()), MOST_ROWS)
        expert_r, order_r = jax.lax.sort_key_val(index_btc.reshape(-1), jnp.arange(rows, dtype=jnp.int32))
        x_rd = jnp.pad(barrier(x_btd.reshape(-1, d)[order_r // c]), ((0, size), (0, 0)))
        weight_r = jnp.pad(weight_btc.reshape(-1)[order_r], (0, size))

        def block(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            first, y_rd = carry
            expert = jax.lax.dynamic_index_in_dim(expert_r, first, keepdims=False)
            of_block = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
            y_sd = layer.one(of_block(x_rd), of_block(weight_r), expert)
            end = jnp.sum(expert_r <= expert, dtype=first.dtype)
            return jnp.minimum(first + size, end), jax.lax.dynamic_update_slice_in_dim(y_rd, y_sd, first, 0)

        start = jnp.zeros((), jnp.int32), jnp.zeros_like(x_rd)
        _, y_rd = jax.lax.while_loop(lambda carry: carry[0] < rows, block, start)
        return y_rd[jnp.argsort(order_r)].reshape(b, t, c, d).sum(-2)

    def _weighted(self, p_bkgts: Array, v_bksh: Entries) -> Array:
        b, k, g, t, s = p_bkgts.shape
        if g * t <= FEW:
            p_bkrs, v_bkhs = scaled(p_bkgts, v_bksh).reshape(b, k, g * t, s), _codes(v_bksh).swapaxes(2, 3)
            a_bkrh = _matmul_few(widen(p_bkrs), v_bkhs, math.gcd(v_bkhs.shape[2], STREAMS[g * t <= FEW // 2]))
        else:
            p_bkrs = p_bkgts.reshape(b, k, g * t, s)
            a_bkrh = _dot(self._operand(p_bkrs), self._operand(decoded(v_bksh)), 3, 2)
        return a_bkrh.reshape(b, k, g, t, -1).transpose(0, 3, 1, 2, 4)

    def _operand(self, x: Array) -> Array:
        """x as the dots of this CPU take it."""
        return x if self.formulation.dot == "ynnpack" else widen(x)


def _codes(x: Entries) -> Array:
    """`codes`, with float8_e4m3 widened by its bits, at three times XLA's rate: seven places up, they are those of a
    float16 that is 2⁸ times as small."""
    if (stored := codes(x)).dtype != jnp.float8_e4m3:
        return stored
    bits = jax.lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return widen(half) * 2.0**8


def _matmul_few(x_bkrc: Array, y_bknc: Array, streams: int = 1) -> Array:
    """x · yᵀ of few rows x, over c, in one reduction that reads y once, parts of n side by side: [b, k, r, n]."""
    r = x_bkrc.shape[2]
    x_rbkc = barrier(jnp.moveaxis(x_bkrc, 2, 0))
    if r * streams == 1:  # a reduction of one result is read at half the rate
        x_rbkc = jnp.pad(x_rbkc, ((0, 1), (0, 0), (0, 0), (0, 0)))
    parts = jnp.split(widen(y_bknc), streams, axis=2)
    y = sums([part * x_bkc[:, :, None] for x_bkc in x_rbkc for part in parts])
    if r * streams == 1:
        return (y[0] + y[1])[:, :, None]
    return jnp.stack([jnp.concatenate(y[i : i + streams], -1) for i in range(0, r * streams, streams)], 2)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """x · y over an axis of each, all but the last two in common, summed in float32; XLA neither swaps nor fuses it."""
    common = tuple(range(x.ndim - 2))
    axes = ((x_axis,), (y_axis,)), (common, common)
    return barrier(jax.lax.dot_general(barrier(x), y, axes, preferred_element_type=jnp.float32))
