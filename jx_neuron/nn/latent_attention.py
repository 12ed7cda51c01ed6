"""Latent attention (DeepSeek-AI, arXiv:2405.04434): keys and values of all heads are made of one latent a position.

Array suffixes are those of jx_neuron.nn.layers and jx_neuron.nn.attention, c a head's entries of a key without
rotation, u the rotated entries that all heads share, o the size of a value, and q and r the ranks of queries and of the
latent.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn.attention import Queries
from jx_neuron.nn.encoded import Entries, decoded
from jx_neuron.nn.layers import Linear, Linears, RMSNorm, random_normal
from jx_neuron.nn.layout import S
from jx_neuron.nn.ops import ops
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions

LATENT = (S("latent", "s r"), S("rope", "s u"))
"""The state of a layer, shared by all heads, and so whole on every core."""

EPS = 1e-6
"""That of the norms of latents, whatever the model's."""


def absorbs(expanded: int, rank: int, tokens: int, positions: int) -> bool:
    """Whether fewer bytes move where queries and outputs of `tokens` are latents of `rank` than where each position has
    a key and a value, which are made of the latent and have `expanded` entries a head together."""
    return 2 * rank * tokens < expanded * positions


def multiply_adds(sizes: Mapping[str, int], tokens: int, positions: int) -> int:
    """Multiplications of one head for the `tokens` of a row, besides one of each token by each parameter: of scores and
    values, and of making keys and values of latents where there are more positions than tokens."""
    c, u, o, r = (sizes[letter] for letter in "cuor")
    if absorbs(c + o, r, tokens, positions):
        return tokens * positions * (2 * r + u)
    return tokens * positions * (c + u + o) + (positions - tokens) * r * (c + o)


class LatentAttention(nnx.Module):
    """Each head's key and value are k_b_proj · latent and v_b_proj · latent, the key with the rotated part behind it.

    low_rank: queries are made of a latent too.
    bias:     of the projections from and to the model's width, except for q_proj.
    scale:    of scores.
    rope:     how the rotated parts are: rope_half or rope_interleaved.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        low_rank: bool,
        bias: bool,
        scale: float,
        rope: Callable[[Array, Rotation], Array],
        rngs: nnx.Rngs,
    ):
        d, n, h, c, u, o, q, r = (sizes[letter] for letter in "dnhcuoqr")
        outputs = dict(latent=(r,), rope=(u,)) | (dict(q=(q,)) if low_rank else {})
        self.down = Linears((d,), outputs, bias=bias, rngs=rngs)
        self.kv_a_layernorm = RMSNorm(r, EPS)
        self.k_b_proj = nnx.Param(random_normal(rngs.params(), (n, c, r), 1 / math.sqrt(r)))
        self.v_b_proj = nnx.Param(random_normal(rngs.params(), (n, o, r), 1 / math.sqrt(r)))
        self.q_a_layernorm: Any = RMSNorm(q, EPS) if low_rank else None
        self.q_b_proj: Any = Linear((q,), (n, h), bias=False, rngs=rngs) if low_rank else None
        self.q_proj: Any = None if low_rank else Linear((d,), (n, h), bias=False, rngs=rngs)
        self.o_proj = Linear((n, o), (d,), bias=bias, rngs=rngs)
        self.scale, self.rope = scale, rope

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        """Returns the output [b, t, d], added to the residual, and the state; `by` is the Rotation of u entries."""
        latent_btr, k_btu, *low = self.down(x_btd)
        q_btnh = self.q_b_proj(self.q_a_layernorm(*low)) if low else self.q_proj(x_btd)
        q_btnh = q_btnh * jnp.asarray(self.scale, q_btnh.dtype)
        q_btnc, q_btnu = jnp.split(q_btnh, [self.k_b_proj.shape[1]], axis=-1)
        k_btu = self.rope(k_btu[:, :, None], by)[:, :, 0]
        (entries, position_bs), state = state.extend(at, latent=self.kv_a_layernorm(latent_btr), rope=k_btu)
        tokens, positions = x_btd.shape[1], position_bs.shape[1]
        (_, c, r), o = self.k_b_proj.shape, self.v_b_proj.shape[1]
        attend = self._absorbed if absorbs(c + o, r, tokens, positions) else self._expanded
        queries = Queries.of(state, at, positions)
        q_btnc, q_btnu = queries.arrange(q_btnc), queries.arrange(self.rope(q_btnu, by))
        mask_bts = position_bs[:, None] <= queries.position_bt[:, :, None]
        a_btno = attend(q_btnc, q_btnu, entries["latent"], entries["rope"], mask_bts)
        return self.o_proj(queries.restore(a_btno)), state

    def _absorbed(self, q_btnc: Array, q_btnu: Array, latent_bsr: Entries, k_bsu: Entries, mask_bts: Array) -> Array:
        """(q · k_b_proj) · latent is q · (k_b_proj · latent): to all heads, latents are one key, and one value."""
        q_btnr = jnp.einsum("btnc,ncr->btnr", q_btnc, self.k_b_proj[...])
        latent_b1sr = latent_bsr[:, None]
        a_bt1nr = _attend(q_btnr[:, :, None], latent_b1sr, q_btnu, k_bsu, latent_b1sr, mask_bts)
        return jnp.einsum("btnr,nor->btno", a_bt1nr[:, :, 0], self.v_b_proj[...])

    def _expanded(self, q_btnc: Array, q_btnu: Array, latent_bsr: Entries, k_bsu: Entries, mask_bts: Array) -> Array:
        """By a key and a value of each head."""
        latent_bsr = decoded(latent_bsr)
        k_bnsc = jnp.einsum("bsr,ncr->bnsc", latent_bsr, self.k_b_proj[...])
        v_bnso = jnp.einsum("bsr,nor->bnso", latent_bsr, self.v_b_proj[...])
        return _attend(q_btnc[:, :, :, None], k_bnsc, q_btnu, k_bsu, v_bnso, mask_bts)[:, :, :, 0]


def _attend(q_btkgc: Array, k_bksc: Entries, q_btnu: Array, k_bsu: Entries, v_bkso: Entries, mask_bts: Array) -> Array:
    """softmax(q · k + the same of the rotated parts) · v, over positions that the mask has: [b, t, k, g, o]."""
    parts = []
    for first, last, seen in ops().query_blocks(*mask_bts.shape[1:]):
        w_bkgts = ops().attention_scores(q_btkgc[:, first:last], k_bksc[:, :, :seen])
        w_b1nts = ops().attention_scores(q_btnu[:, first:last, None], k_bsu[:, None, :seen])
        w_bkgts += w_b1nts.reshape(w_bkgts.shape)
        w_bkgts = jnp.where(mask_bts[:, None, None, first:last, :seen], w_bkgts, jnp.finfo(jnp.float32).min)
        parts.append(ops().attention_values(w_bkgts, v_bkso[:, :, :seen]))
    return jnp.concatenate(parts, axis=1)
