"""The recurrent sublayer of Mamba-2 (Dao, Gu, arXiv:2405.21060), whole or next to attention.

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
    """RMSNorm over all heads of a group together, [b, t, p, i], with scale [p, i].

    Heads of zeros may be added, and groups copied, each copy with a part of the heads: `of_group` [g, groups] says
    which group each is of.
    """

    def __init__(self, sizes: Mapping[str, int], eps: float):
        p, g, i = (sizes[c] for c in "pgi")
        self.scale, self.of_group = nnx.Param(jnp.ones((p, i))), nnx.Param(jnp.eye(g))
        self.groups, self.size, self.eps = g, p // g * i, eps

    def __call__(self, x_btpi: Array) -> Array:
        b, t, p, i = x_btpi.shape
        of_group = self.of_group[...].astype(jnp.float32)
        y_btgc = x_btpi.astype(jnp.float32).reshape(b, t, len(of_group), -1)
        mean_btg = ops().mean(y_btgc * y_btgc)[..., 0] * (y_btgc.shape[-1] / self.size)
        if len(of_group) != self.groups:
            mean_btg = mean_btg @ of_group @ of_group.T
        y_btgc = y_btgc * jax.lax.rsqrt(mean_btg + self.eps)[..., None]
        return (y_btgc.reshape(b, t, p, i) * self.scale[...]).astype(x_btpi.dtype)


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
        d, p, g, i, j, w = (sizes[c] for c in "dpgijw")
        self.in_proj = Linears((d,), dict(z=(p, i), x=(p, i), B=(g, j), C=(g, j), dt=(p,)), bias=bias, rngs=rngs)
        self.conv_x, self.conv_B, self.conv_C = (
            CausalConv(w, channels, bias=conv_bias, act=act, rngs=rngs) for channels in ((p, i), (g, j), (g, j))
        )
        self.A_log, self.D, self.dt_bias = (nnx.Param(jnp.zeros((p,))) for _ in range(3))
        self.norm: Any = norm
        self.out_proj = Linear((p, i), (d,), bias=bias if out_bias is None else out_bias, rngs=rngs)
        self.gate_first, self.scales = gate_first, tuple(scales or [1.0] * 5)

    def __call__(self, u_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        """Returns the output [b, t, d], which is added to the residual, and the state."""
        z_btpi, x_btpi, b_btgj, c_btgj, dt_btp = (
            y if scale == 1 else y * scale for y, scale in zip(self.in_proj(u_btd), self.scales, strict=True)
        )
        x_btpi, state = self.conv_x(x_btpi, "x", state, at)
        b_btgj, state = self.conv_B(b_btgj, "B", state, at)
        c_btgj, state = self.conv_C(c_btgj, "C", state, at)
        x_btpi, b_btgj, c_btgj, dt_btp, dt_bias, a_log, skip = (
            y.astype(jnp.float32)
            for y in (x_btpi, b_btgj, c_btgj, dt_btp, self.dt_bias[...], self.A_log[...], self.D[...])
        )
        (b, t, _, i), g = x_btpi.shape, b_btgj.shape[2]
        dt_btp = jnp.where(at.real_bt[..., None], jax.nn.softplus(dt_btp + dt_bias), 0)
        dt_btgq, log_btgq = (y.reshape(b, t, g, -1) for y in (dt_btp, -jnp.exp(a_log) * dt_btp))
        x_btgqi, s_bpij = x_btpi.reshape(*dt_btgq.shape, i), state.read("ssm", at)
        y_btgqi, s_bgqij = ssd(
            x_btgqi * dt_btgq[..., None], b_btgj, c_btgj, log_btgq, s_bpij.reshape(b, g, -1, *s_bpij.shape[2:])
        )
        state = state.write(at, ssm=s_bgqij.reshape(s_bpij.shape))
        y_btpi = y_btgqi.reshape(x_btpi.shape) + skip[:, None] * x_btpi
        gate_btpi = jax.nn.silu(z_btpi.astype(jnp.float32))
        if self.norm is None:
            y_btpi = y_btpi * gate_btpi
        else:
            y_btpi = self.norm(y_btpi * gate_btpi) if self.gate_first else self.norm(y_btpi) * gate_btpi
        return self.out_proj(y_btpi.astype(u_btd.dtype)), state
