"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv:2412.06464) as Qwen3-Next has it.

Array suffixes are those of jx_neuron.nn.recurrent. `sizes` gives each axis letter its length, as a Config's does.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn.layers import Linear, Linears, RMSNorm
from jx_neuron.nn.recurrent import CausalConv, gated_delta
from jx_neuron.nn.state import LayerState, Positions


class GatedDeltaNet(nnx.Module):
    """out_proj(norm(y) · silu(z)) of what `gated_delta` makes of q, k, v, β = sigmoid(b) and a decay of a.

    act: of the convolutions of q, k and v.
    """

    def __init__(self, sizes: Mapping[str, int], *, act: Callable[[Array], Array], eps: float, rngs: nnx.Rngs):
        d, p, g, i, j, w = (sizes[c] for c in "dpgijw")
        outputs = dict(q=(g, j), k=(g, j), v=(p, i), z=(p, i), b=(p,), a=(p,))
        self.in_proj = Linears((d,), outputs, bias=False, rngs=rngs)
        self.conv_q, self.conv_k, self.conv_v = (
            CausalConv(w, channels, bias=False, act=act, rngs=rngs) for channels in ((g, j), (g, j), (p, i))
        )
        self.A_log, self.dt_bias = nnx.Param(jnp.zeros((p,))), nnx.Param(jnp.zeros((p,)))
        self.norm = RMSNorm(i, eps)
        self.out_proj = Linear((p, i), (d,), bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        """Returns the output [b, t, d], which is added to the residual, and the state."""
        q_btgj, k_btgj, v_btpi, z_btpi, b_btp, a_btp = self.in_proj(x_btd)
        q_btgj, state = self.conv_q(q_btgj, "q", state, at)
        k_btgj, state = self.conv_k(k_btgj, "k", state, at)
        v_btpi, state = self.conv_v(v_btpi, "v", state, at)
        q_btgj, k_btgj, v_btpi, z_btpi, b_btp, a_btp, a_log, dt_bias = (
            y.astype(jnp.float32)
            for y in (q_btgj, k_btgj, v_btpi, z_btpi, b_btp, a_btp, self.A_log[...], self.dt_bias[...])
        )
        (b, t, g, j), real_bt1 = q_btgj.shape, at.real_bt[..., None]
        beta_btp = jnp.where(real_bt1, jax.nn.sigmoid(b_btp), 0)
        log_btp = jnp.where(real_bt1, -jnp.exp(a_log) * jax.nn.softplus(a_btp + dt_bias), 0)
        beta_btgq, log_btgq = (y.reshape(b, t, g, -1) for y in (beta_btp, log_btp))
        v_btgqi, s_bpij = v_btpi.reshape(*beta_btgq.shape, -1), state.read("s", at)
        y_btgqi, s_bgqij = gated_delta(
            _unit(q_btgj) * j**-0.5,
            _unit(k_btgj),
            v_btgqi,
            log_btgq,
            beta_btgq,
            s_bpij.reshape(b, g, -1, *s_bpij.shape[2:]),
        )
        state = state.write(at, s=s_bgqij.reshape(s_bpij.shape))
        y_btpi = self.norm(y_btgqi.reshape(v_btpi.shape)) * jax.nn.silu(z_btpi)
        return self.out_proj(y_btpi.astype(x_btd.dtype)), state


def _unit(x: Array) -> Array:
    """x / sqrt(Σx² + 1e-6) over the last axis."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)
