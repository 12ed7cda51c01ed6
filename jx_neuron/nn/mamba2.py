"""The recurrent sublayer of Mamba-2 (Dao, Gu, arXiv:2405.21060), whole or beside attention.

Array suffixes are those of jx_neuron.nn.recurrent. `sizes` gives each axis letter its length, as a Config's does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn.layers import Linear, Linears
from jx_neuron.nn.ops import ops
from jx_neuron.nn.recurrent import CausalConv, ssd
from jx_neuron.nn.state import LayerState, Positions


class GroupsRMSNorm(nnx.Module):
    """RMSNorm over all heads of a group together, [b, t, m, i], with scale [m, i].

    Heads of zeros may be added, and groups copied, each copy with a part of the heads: `of_group` [g, groups] says
    which group each is of.
    """

    def __init__(self, sizes: Mapping[str, int], eps: float):
        m, g, i = (sizes[c] for c in "mgi")
        self.scale, self.of_group = nnx.Param(jnp.ones((m, i))), nnx.Param(jnp.eye(g))
        self.groups, self.size, self.eps = g, m // g * i, eps

    def __call__(self, x_btmi: Array) -> Array:
        b, t, m, i = x_btmi.shape
        of_group = self.of_group[...].astype(jnp.float32)
        y_btgc = x_btmi.astype(jnp.float32).reshape(b, t, len(of_group), -1)
        mean_btg = ops().mean(y_btgc * y_btgc)[..., 0] * (y_btgc.shape[-1] / self.size)
        if len(of_group) != self.groups:
            mean_btg = mean_btg @ of_group @ of_group.T
        y_btgc = y_btgc * jax.lax.rsqrt(mean_btg + self.eps)[..., None]
        return (y_btgc.reshape(b, t, m, i) * self.scale[...]).astype(x_btmi.dtype)


class Mamba2(nnx.Module):
    """out_proj(norm(y · silu(z))) of what the recurrence `ssd` makes of x, B, C and Δ.

    bias:           of in_proj; of out_proj, unless `out_bias` differs.
    conv_bias, act: of the convolutions of x, B and C, and what comes after them.
    norm:           without one, y · silu(z) alone.
    gate_first:     whether the norm is of y · silu(z), or silu(z) multiplies what the norm gives.
    scales:         of z, x, B, C and Δ as in_proj gives them (Falcon-H1's ssm_multipliers).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        bias: bool,
        out_bias: bool | None = None,
        conv_bias: bool,
        act: Callable[[Array], Array],
        norm: nnx.Module | None,
        gate_first: bool = True,
        scales: Sequence[float] | None = None,
        rngs: nnx.Rngs,
    ):
        d, m, g, i, j, w = (sizes[c] for c in "dmgijw")
        self.in_proj = Linears((d,), dict(z=(m, i), x=(m, i), B=(g, j), C=(g, j), dt=(m,)), bias=bias, rngs=rngs)
        self.conv_x, self.conv_B, self.conv_C = (
            CausalConv(w, channels, bias=conv_bias, act=act, rngs=rngs) for channels in ((m, i), (g, j), (g, j))
        )
        self.A_log, self.D, self.dt_bias = (nnx.Param(jnp.zeros((m,))) for _ in range(3))
        self.norm: Any = norm
        self.out_proj = Linear((m, i), (d,), bias=bias if out_bias is None else out_bias, rngs=rngs)
        self.gate_first, self.scales = gate_first, tuple(scales or [1.0] * 5)

    def __call__(self, u_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        """What is added to the residual, [b, t, d], and the state written to."""
        z_btmi, x_btmi, b_btgj, c_btgj, dt_btm = (
            y if scale == 1 else y * scale for y, scale in zip(self.in_proj(u_btd), self.scales, strict=True)
        )
        x_btmi, state = self.conv_x(x_btmi, "x", state, at)
        b_btgj, state = self.conv_B(b_btgj, "B", state, at)
        c_btgj, state = self.conv_C(c_btgj, "C", state, at)
        x_btmi, b_btgj, c_btgj, dt_btm, dt_bias, a_log, skip = (
            y.astype(jnp.float32)
            for y in (x_btmi, b_btgj, c_btgj, dt_btm, self.dt_bias[...], self.A_log[...], self.D[...])
        )
        (b, t, _, i), g = x_btmi.shape, b_btgj.shape[2]
        dt_btm = jnp.where(at.real_bt[..., None], jax.nn.softplus(dt_btm + dt_bias), 0)
        dt_btgq, log_btgq = (y.reshape(b, t, g, -1) for y in (dt_btm, -jnp.exp(a_log) * dt_btm))
        x_btgqi, s_bmij = x_btmi.reshape(*dt_btgq.shape, i), state.read("ssm", at)
        y_btgqi, s_bgqij = ssd(
            x_btgqi * dt_btgq[..., None], b_btgj, c_btgj, log_btgq, s_bmij.reshape(b, g, -1, *s_bmij.shape[2:])
        )
        state = state.write(at, ssm=s_bgqij.reshape(s_bmij.shape))
        y_btmi = y_btgqi.reshape(x_btmi.shape) + skip[:, None] * x_btmi
        gate_btmi = jax.nn.silu(z_btmi.astype(jnp.float32))
        if self.norm is None:
            y_btmi = y_btmi * gate_btmi
        else:
            y_btmi = self.norm(y_btmi * gate_btmi) if self.gate_first else self.norm(y_btmi) * gate_btmi
        return self.out_proj(y_btmi.astype(u_btd.dtype)), state
