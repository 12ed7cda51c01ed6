"""The two sublayers of most decoders' blocks, with projections named as Llama's.

Array suffixes are those of jx_neuron.nn.layers. `sizes` gives each axis letter its length, as a Config's does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al., arXiv:2305.13245).

    bias:            of the projections to queries, keys and values, and of o_proj, unless `out_bias` differs.
    clip:            queries, keys and values are clipped to ±clip (MPT's clip_qkv).
    projections:     without v_proj, values are what k_proj gives; without k_proj too, the layer attends to the keys and
                     values of another (`Config.own_state`).
    q_norm, k_norm:  norms of queries and keys before they are rotated (Henry et al., arXiv:2010.04245).
    v_norm:          a norm of values.
    rope:            how heads are rotated: rope_half or rope_interleaved.
    sinks:           each head has a logit that takes part in the softmax and has no value, as `attend` takes it.
    scale, window, chunk, soft_cap: those of `attend`.
    inputs:          the width of what queries, keys and values are made of; by default that of what it gives.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        bias: bool,
        out_bias: bool | None = None,
        projections: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
        clip: float | None = None,
        q_norm: nnx.Module | None = None,
        k_norm: nnx.Module | None = None,
        v_norm: nnx.Module | None = None,
        rope: Callable[[Array, Rotation], Array] = rope_half,
        scale: float | None = None,
        window: int | None = None,
        chunk: int | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        inputs: int | None = None,
        rngs: nnx.Rngs,
    ):
        d, n, k, h = (sizes[c] for c in "dnkh")
        outputs = {name: (n if name == "q_proj" else k, h) for name in projections}
        self.qkv = Linears((d if inputs is None else inputs,), outputs, bias=bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=bias if out_bias is None else out_bias, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros((n,))) if sinks else None
        self.q_norm: Any = q_norm
        self.k_norm: Any = k_norm
        self.v_norm: Any = v_norm
        self.clip, self.rope = clip, rope
        self.scale, self.window, self.chunk, self.soft_cap = scale, window, chunk, soft_cap

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Any = None, *, bias_ns: Array | None = None
    ) -> tuple[Array, LayerState]:
        """Returns the output [b, t, d], which is added to the residual, and the state.

        by: the Rotation of queries and keys, or None without RoPE. bias_ns: ALiBi's, as `attend` takes it.
        """
        a_btnh, state = self.attended(x_btd, state, at, by, bias_ns)
        return self.o_proj(a_btnh), state

    def attended(
        self, x_btd: Array, state: LayerState, at: Positions, by: Any, bias_ns: Array | None = None
    ) -> tuple[Array, LayerState]:
        """Returns the input of o_proj, [b, t, n, h], and the state."""
        q_btnh, k_btkh, v_btkh = self.heads(x_btd, by)
        sinks_n = None if self.sinks is None else self.sinks[...]
        options: dict[str, Any] = dict(window=self.window, chunk=self.chunk, soft_cap=self.soft_cap)
        options |= dict(sinks_n=sinks_n, bias_ns=bias_ns)
        return attend(q_btnh, k_btkh, v_btkh, state, at, self.scale, **options)

    def heads(self, x_btd: Array, by: Any) -> tuple[Array, Array | None, Array | None]:
        """Queries [b, t, n, h], keys and values [b, t, k, h], as they are attended to; None of another layer."""
        heads = self.clipped(self.qkv(x_btd))
        q_btnh, k_btkh, v_btkh = (*heads, heads[-1])[:3] if len(heads) > 1 else (heads[0], None, None)
        if self.q_norm is not None:
            q_btnh = self.q_norm(q_btnh)
        if self.k_norm is not None and k_btkh is not None:
            k_btkh = self.k_norm(k_btkh)
        if self.v_norm is not None and v_btkh is not None:
            v_btkh = self.v_norm(v_btkh)
        if by is not None:
            q_btnh, k_btkh = self.rope(q_btnh, by), None if k_btkh is None else self.rope(k_btkh, by)
        return q_btnh, k_btkh, v_btkh

    def clipped(self, heads: Sequence[Array]) -> Sequence[Array]:
        """Within ±clip, where there is one."""
        return heads if self.clip is None else [jnp.clip(y, -self.clip, self.clip) for y in heads]


class GatedAttention(Attention):
    """The output of each head is multiplied by sigmoid(gate_proj(x)) (Qiu et al., arXiv:2505.06708)."""

    def __init__(self, sizes: Mapping[str, int], *, bias: bool, rngs: nnx.Rngs, **options: Any):
        super().__init__(sizes, bias=bias, rngs=rngs, **options)
        d, n, h = (sizes[c] for c in "dnh")
        self.gate_proj = Linear((d,), (n, h), bias=bias, rngs=rngs)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Any = None, *, bias_ns: Array | None = None
    ) -> tuple[Array, LayerState]:
        a_btnh, state = self.attended(x_btd, state, at, by, bias_ns)
        return self.o_proj(a_btnh * jax.nn.sigmoid(self.gate_proj(x_btd))), state


class NormAfterRopeAttention(Attention):
    """Queries and keys are normalized after RoPE, not before."""

    def heads(self, x_btd: Array, by: Any) -> tuple[Array, Array, Array]:
        q_btnh, k_btkh, v_btkh = self.qkv(x_btd)
        q_btnh, k_btkh = self.rope(q_btnh, by), self.rope(k_btkh, by)
        if self.q_norm is not None:
            q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh)
        return q_btnh, k_btkh, v_btkh


class HeadsNormAttention(Attention):
    """Queries and keys are normalized over all heads together (OLMo 2, arXiv:2501.00656), each by a `HeadsRMSNorm`,
    before they are clipped."""

    def heads(self, x_btd: Array, by: tuple[Rotation, Array]) -> tuple[Array, Array, Array]:
        """by: the Rotation of queries and keys, and how often each key head is there, of `head_copies`."""
        rotation, copies_k = by
        q_btnh, k_btkh, v_btkh = self.qkv(x_btd)
        q_btnh, k_btkh, v_btkh = self.clipped([self.q_norm(q_btnh), self.k_norm(k_btkh, copies_k), v_btkh])
        return self.rope(q_btnh, rotation), self.rope(k_btkh, rotation), v_btkh


class GatedMLP(nnx.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)) (Shazeer, arXiv:2002.05202); `act` is of `ACT`, or its name there."""

    def __init__(self, sizes: Mapping[str, int], act: str | Callable[[Array], Array], *, bias: bool, rngs: nnx.Rngs):
        d, f = sizes["d"], sizes["f"]
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=bias, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=bias, rngs=rngs)
        self.act_fn = ACT[act] if isinstance(act, str) else act

    def __call__(self, x_btd: Array) -> Array:
        return self.down_proj(self.hidden(x_btd))

    def hidden(self, x_btd: Array) -> Array:
        """The input of down_proj, [b, t, f]."""
        gate_btf, up_btf = self.gate_up(x_btd)
        return self.act_fn(gate_btf) * up_btf


class MLP(nnx.Module):
    """down_proj(act(up_proj(x))); `act` is a function or module, or a name in `ACT`."""

    def __init__(self, sizes: Mapping[str, int], act: str | Callable[[Array], Array], *, bias: bool, rngs: nnx.Rngs):
        d, f = sizes["d"], sizes["f"]
        self.up_proj = Linear((d,), (f,), bias=bias, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=bias, rngs=rngs)
        self.act_fn = ACT[act] if isinstance(act, str) else act

    def __call__(self, x_btd: Array) -> Array:
        return self.down_proj(self.act_fn(self.up_proj(x_btd)))
