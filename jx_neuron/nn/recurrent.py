"""Parts of recurrent layers: a causal convolution, and linear recurrences computed in chunks.

A state S [i, j] of each head is multiplied by a decay at every token, and changed by an outer product. Within a chunk
of tokens that becomes matrix products; from chunk to chunk the state goes on. One token is a chunk of one.

Padding has no decay and adds nothing. Array suffixes are those of jx_neuron.nn.layers, and: s tokens too, g groups, q
heads of a group, p heads (g·q), i size of a head, j size of the state, c channels, r inputs that a convolution keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jx_neuron.nn.layers import Linear, Linears, random_normal
from jx_neuron.nn.state import LayerState, Positions

CHUNK = 64
"""Tokens of a chunk: products within it take tokens² of time, and the state is read and written once a chunk."""


class CausalConv(nnx.Module):
    """act(bias + Σ_k kernel_k · x_(t + 1 - taps + k)) of each channel alone; before a sequence, x is 0.

    The state has a row for the last taps - 1 inputs, [r, *channels].
    """

    def __init__(
        self,
        taps: int,
        channels: Sequence[int],
        *,
        bias: bool,
        act: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(random_normal(rngs.params(), (taps, *channels), taps**-0.5))
        self.bias = nnx.Param(jnp.zeros(tuple(channels))) if bias else None
        self.act = act

    def __call__(self, x: Array, row: str, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        """[b, t, *channels] of as many inputs, and the state with the last of them in `row`."""
        kernel, t = self.kernel[...].astype(jnp.float32), x.shape[1]
        seen = jnp.concatenate([state.read(row, at).astype(x.dtype), x], axis=1)
        y = sum(tap * seen[:, k : k + t].astype(jnp.float32) for k, tap in enumerate(kernel))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        if self.act is not None:
            y = self.act(y)
        return y.astype(x.dtype), state.write(at, **{row: _last(seen, len(kernel) - 1, at)})


class ShortConv(nnx.Module):
    """out_proj(C · conv(B · x)), with B, C and x of in_proj (LFM2, arXiv:2511.23404)."""

    def __init__(self, sizes: Mapping[str, int], *, bias: bool, rngs: nnx.Rngs):
        d, c, w = (sizes[letter] for letter in "dcw")
        self.in_proj = Linears((d,), dict(B=(c,), C=(c,), x=(c,)), bias=bias, rngs=rngs)
        self.conv = CausalConv(w, (c,), bias=bias, rngs=rngs)
        self.out_proj = Linear((c,), (d,), bias=bias, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        b_btc, c_btc, x_btc = self.in_proj(x_btd)
        y_btc, state = self.conv(b_btc * x_btc, "x", state, at)
        return self.out_proj(c_btc * y_btc), state


def _last(seen: Array, count: int, at: Positions) -> Array:
    """The last `count` real ones of inputs [b, count + t, …]."""
    if seen.shape[1] == count + 1:
        return seen[:, 1:]
    index_br = at.length_b[:, None] + jnp.arange(count, dtype=jnp.int32)
    return jnp.take_along_axis(seen, index_br.reshape(*index_br.shape, *[1] * (seen.ndim - 2)), axis=1, mode="clip")


class Decays(NamedTuple):
    """Products of decays within a chunk, float32.

    start:   from its start to each token, that token's among them, [b, g, q, t].
    between: from behind token s to token t, [b, g, q, t, s]; 0 where s comes later.
    """

    start: Array
    between: Array

    @property
    def end(self) -> Array:
        """From behind each token to the end, [b, g, q, s]."""
        return self.between[..., -1, :]

    @property
    def whole(self) -> Array:
        """Over the whole chunk, for states [b, g, q, i, j]."""
        return self.start[..., -1, None, None]


def decays(log_btgq: Array) -> Decays:
    """Of logarithms, which are 0 or less. They are summed from behind s, not as a difference of two sums, in which what
    is small would be lost."""
    until = np.tril(np.ones([log_btgq.shape[1]] * 2, np.float32))
    behind = until - np.eye(len(until), dtype=np.float32)
    log_bgqs = jnp.einsum("bsgq->bgqs", log_btgq)
    between_bgqts = jnp.einsum("tu,bgqus->bgqts", until, log_bgqs[..., None] * behind)
    return Decays(jnp.exp(log_bgqs @ until.T), until * jnp.exp(between_bgqts))


def ssd(x_btgqi: Array, b_btgj: Array, c_btgj: Array, log_btgq: Array, s_bgqij: Array) -> tuple[Array, Array]:
    """S_t = a_t S_(t-1) + x_t B_tᵀ and y_t = S_t C_t, with a = exp(log): y [b, t, g, q, i], and S after the last token.

    The state-space duality of Mamba-2 (Dao, Gu, arXiv:2405.21060, section 6); x is Δ·x there.
    """

    def chunk(s_bgqij: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        x_btgqi, b_btgj, c_btgj, log_btgq = inputs
        decay = decays(log_btgq)
        w_bgqts = jnp.einsum("btgj,bsgj->bgts", c_btgj, b_btgj)[:, :, None] * decay.between
        old_bgqti = jnp.einsum("btgj,bgqij->bgqti", c_btgj, s_bgqij) * decay.start[..., None]
        y_bgqti = old_bgqti + jnp.einsum("bgqts,bsgqi->bgqti", w_bgqts, x_btgqi)
        x_bgqsi = jnp.einsum("bsgqi,bgqs->bgqsi", x_btgqi, decay.end)
        s_bgqij = s_bgqij * decay.whole + jnp.einsum("bgqsi,bsgj->bgqij", x_bgqsi, b_btgj)
        return s_bgqij, jnp.einsum("bgqti->btgqi", y_bgqti)

    return _in_chunks(chunk, s_bgqij, (x_btgqi, b_btgj, c_btgj, log_btgq))


def gated_delta(
    q_btgj: Array, k_btgj: Array, v_btgqi: Array, log_btgq: Array, beta_btgq: Array, s_bgqij: Array
) -> tuple[Array, Array]:
    """S_t = a_t S_(t-1) + u_t k_tᵀ with u_t = β_t (v_t - a_t S_(t-1) k_t), and y_t = S_t q_t, with a = exp(log):
    y [b, t, g, q, i], and S after the last token.

    The gated delta rule (Yang, Kautz, Hatamizadeh, arXiv:2412.06464, section 3.3). Within a chunk, (I + A) u = β (v -
    what S held before it), with A_ts = β_t (k_t · k_s) · decay, s < t.
    """

    def chunk(s_bgqij: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q_btgj, k_btgj, v_btgqi, log_btgq, beta_btgq = inputs
        decay = decays(log_btgq)
        beta_bgqt1 = jnp.einsum("btgq->bgqt", beta_btgq)[..., None]
        held_bgqti = jnp.einsum("btgj,bgqij->bgqti", k_btgj, s_bgqij) * decay.start[..., None]
        kk_bgqts = jnp.einsum("btgj,bsgj->bgts", k_btgj, k_btgj)[:, :, None] * decay.between
        u_bgqti = _unit_lower_inverse(beta_bgqt1 * kk_bgqts) @ (
            beta_bgqt1 * (jnp.einsum("btgqi->bgqti", v_btgqi) - held_bgqti)
        )
        qk_bgqts = jnp.einsum("btgj,bsgj->bgts", q_btgj, k_btgj)[:, :, None] * decay.between
        old_bgqti = jnp.einsum("btgj,bgqij->bgqti", q_btgj, s_bgqij) * decay.start[..., None]
        y_bgqti = old_bgqti + qk_bgqts @ u_bgqti
        u_bgqti = u_bgqti * decay.end[..., None]
        s_bgqij = s_bgqij * decay.whole + jnp.einsum("bgqti,btgj->bgqij", u_bgqti, k_btgj)
        return s_bgqij, jnp.einsum("bgqti->btgqi", y_bgqti)

    return _in_chunks(chunk, s_bgqij, (q_btgj, k_btgj, v_btgqi, log_btgq, beta_btgq))


def _unit_lower_inverse(a_ts: Array) -> Array:
    """(I + A)⁻¹ for the part of A below the diagonal, [..., t, t].

    Blocks on the diagonal are inverted two by two: [[P, 0], [A, Q]]⁻¹ = [[P⁻¹, 0], [-Q⁻¹ A P⁻¹, Q⁻¹]].
    """
    t = a_ts.shape[-1]
    inverse_ts, size = jnp.broadcast_to(jnp.eye(t, dtype=a_ts.dtype), a_ts.shape), 1
    while size < t:
        block = np.arange(t) // size
        is_below = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)
        inverse_ts = inverse_ts - inverse_ts @ (a_ts * is_below.astype(np.float32)) @ inverse_ts
        size *= 2
    return inverse_ts


def _in_chunks(chunk: Any, s_bgqij: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """y [b, t, …] of inputs [b, t, …], and the state after all chunks; the last one ends in zeros."""
    b, t = inputs[0].shape[:2]
    if t <= CHUNK:
        s_bgqij, y = chunk(s_bgqij, inputs)
        return y, s_bgqij

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -t % CHUNK), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(b, -1, CHUNK, *x.shape[2:]), 1, 0)

    s_bgqij, y = jax.lax.scan(chunk, s_bgqij, tuple(map(split, inputs)))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, *y.shape[3:])[:, :t], s_bgqij
