"""Mixtures of experts: a router chooses a few of many gated MLPs for each token (Shazeer et al., arXiv:1701.06538).

Array suffixes are those of jx_neuron.nn.layers, e experts, c the experts chosen for a token, m the width of an expert,
r rows that share an expert. Each core holds a part of the width of every expert: all have the same work whichever are
chosen, and one all-reduce sums what they give.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn import blocks
from jx_neuron.nn.layers import ACT, Linear, random_normal
from jx_neuron.nn.ops import ops
from jx_neuron.nn.quantized import Quantized
from jx_neuron.nn.sublayers import GatedMLP

SCORES: Mapping[str, Callable[[Array], Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


class Router(nnx.Module):
    """Chooses the `chosen` experts of the highest scores, and weighs them by these.

    score:     of an expert, from its logit: the softmax over all, or the sigmoid.
    after:     the logits are chosen first, and scored among themselves.
    corrected: a bias is added to the scores for choosing only (DeepSeek-AI, arXiv:2412.19437).
    groups:    how many groups the experts are in, and how many of these, by the sum of their `best` best scores, they
               are chosen from.
    normalize: weights are divided by their sum, to which `eps` is added, and which is at least `least`.
    scale:     weights are multiplied by it.
    bias:      of the logits.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        chosen: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        after: bool = False,
        corrected: bool = False,
        groups: tuple[int, int] = (1, 1),
        best: int = 2,
        normalize: bool = False,
        eps: float = 0.0,
        least: float = 0.0,
        scale: float = 1.0,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        d, e = sizes["d"], sizes["e"]
        self.logits = Linear((d,), (e,), bias=bias, rngs=rngs)
        self.correction = nnx.Param(jnp.zeros((e,))) if corrected else None
        self.chosen, self.score, self.after, self.groups, self.best = chosen, score, after, groups, best
        self.normalize, self.eps, self.least, self.scale = normalize, eps, least, scale

    def __call__(self, x_btd: Array) -> tuple[Array, Array]:
        """Weights [b, t, c], float32, and numbers [b, t, c] of the experts of each token."""
        score = SCORES[self.score]
        logits_bte = self.logits(x_btd.astype(jnp.float32))
        score_bte = logits_bte if self.after else score(logits_bte)
        ranked_bte = score_bte if self.correction is None else score_bte + self.correction[...]
        weight_btc, index_btc = jax.lax.top_k(self._within_groups(ranked_bte), self.chosen)
        if self.correction is not None:
            weight_btc = jnp.sum(jnp.where(is_chosen(index_btc, score_bte), score_bte[..., None, :], 0), axis=-1)
        if self.after:
            weight_btc = score(weight_btc)
        if self.normalize:
            sum_bt1 = jnp.sum(weight_btc, axis=-1, keepdims=True)
            weight_btc = weight_btc / jnp.maximum(sum_bt1 + self.eps, self.least)
        return weight_btc * self.scale, index_btc

    def _within_groups(self, score_bte: Array) -> Array:
        """The scores, and the least float for experts of groups that are not chosen (DeepSeek-AI, arXiv:2412.19437)."""
        count, kept = self.groups
        if count == 1:
            return score_bte
        score_btgi = score_bte.reshape(*score_bte.shape[:2], count, -1)
        best_btgi, _ = jax.lax.top_k(score_btgi, self.best)
        _, index_btk = jax.lax.top_k(jnp.sum(best_btgi, axis=-1), kept)
        kept_btg = jnp.any(is_chosen(index_btk, best_btgi[..., 0]), axis=-2)
        return jnp.where(kept_btg[..., None], score_btgi, jnp.finfo(score_btgi.dtype).min).reshape(score_bte.shape)


def is_chosen(index_btc: Array, score_bte: Array) -> Array:
    """Whether each entry of `score_bte` is that of each index: [b, t, c, e]."""
    return index_btc[..., None] == jnp.arange(score_bte.shape[-1], dtype=index_btc.dtype)


class ExpertLinear(nnx.Module):
    """kernel [e, inputs, outputs], or as it is stored (jx_neuron.nn.kernel and .quantized), and bias [e, outputs], of
    one layer of all experts."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        kernel = random_normal(rngs.params(), (experts, inputs, outputs), 1.0 / math.sqrt(inputs))
        self.kernel: Any = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((experts, outputs))) if bias else None

    def dense(self, x_btd: Array) -> Array:
        """The outputs of every expert's layer: [b, t, e, outputs]."""
        y_btem = jnp.einsum("btd,edm->btem", x_btd, self.matrices(x_btd.dtype))
        return y_btem if self.bias is None else y_btem + self.bias[...]

    def chosen(self, x_btd: Array, index_btc: Array) -> Array:
        """The outputs of the layers of each token's experts: [b, t, c, outputs]."""
        y_btcm = jnp.einsum("btd,btcdm->btcm", x_btd, self.matrices(x_btd.dtype, index_btc))
        return y_btcm if self.bias is None else y_btcm + take(self.bias[...], index_btc)

    def matrices(self, dtype: Any, index: Array | None = None) -> Array:
        """The matrices of all experts, [e, inputs, outputs], or of those numbered, [*index, inputs, outputs]; what is
        quantized is widened to `dtype`."""

        def part(array: Array) -> Array:
            return array if index is None else take(array, index)

        return self.kernel.widened(dtype, part) if isinstance(self.kernel, Quantized) else part(self.kernel[...])

    def one(self, x_rd: Array, expert: Array) -> Array:
        """The outputs of one expert's layer: [r, outputs]."""
        kernel: Any = self.kernel.get_value()
        is_plain = isinstance(kernel, Array | Quantized)
        y_rm = x_rd @ self.matrices(x_rd.dtype, expert) if is_plain else kernel.matmul_one(x_rd, expert)
        if self.bias is None:
            return y_rm
        return y_rm + jax.lax.dynamic_index_in_dim(self.bias[...], expert, keepdims=False)


def take(array: Array, index: Array) -> Array:
    """The entries of `array` along its first axis that are numbered: [*index, …]."""
    return array.at[index].get(mode="promise_in_bounds")


class Experts(nnx.Module):
    """Gated MLPs of one form. A token's is the sum of what its experts give, each times its weight.

    weigh_input: weights multiply what enters an expert, not what it gives (Llama 4).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        act: str,
        *,
        bias: bool = False,
        weigh_input: bool = False,
        rngs: nnx.Rngs,
    ):
        d, e, m = (sizes[c] for c in "dem")
        self.gate_proj = ExpertLinear(e, d, m, bias=bias, rngs=rngs)
        self.up_proj = ExpertLinear(e, d, m, bias=bias, rngs=rngs)
        self.down_proj = ExpertLinear(e, m, d, bias=bias, rngs=rngs)
        self.act_fn, self.count, self.weigh_input = ACT[act], e, weigh_input

    @property
    def width(self) -> int:
        """Of an expert, over all cores."""
        return int(self.down_proj.kernel.shape[1])

    def __call__(self, x_btd: Array, weight_btc: Array, index_btc: Array) -> Array:
        """The sum [b, t, d] over each token's experts, of weights and numbers that a `Router` gives."""
        return ops().experts(self, x_btd, weight_btc.astype(x_btd.dtype), index_btc)

    def gated(self, gate: Array, up: Array) -> Array:
        """The hidden features."""
        return self.act_fn(gate) * up

    def dense(self, x_btd: Array, weight_btc: Array, index_btc: Array) -> Array:
        """By every expert: side by side they are one wide gated MLP, whose features a token's weights multiply."""
        gate_btem, up_btem = self.gate_proj.dense(x_btd), self.up_proj.dense(x_btd)
        weight_bte = self._weights(weight_btc, index_btc)
        hidden_btem = self._weighted(gate_btem, up_btem, weight_bte[..., None])
        y_btd = jnp.einsum("btem,emd->btd", hidden_btem, self.down_proj.matrices(x_btd.dtype))
        return self._biased(y_btd, weight_bte)

    def of_chosen(self, x_btd: Array, weight_btc: Array, index_btc: Array) -> Array:
        """By the experts chosen, whose parameters are gathered."""
        gate_btcm, up_btcm = self.gate_proj.chosen(x_btd, index_btc), self.up_proj.chosen(x_btd, index_btc)
        hidden_btcm = self._weighted(gate_btcm, up_btcm, weight_btc[..., None])
        down_btcmd = self.down_proj.matrices(x_btd.dtype, index_btc)
        y_btd = jnp.einsum("btcm,btcmd->btd", hidden_btcm, down_btcmd)
        bias = self.down_proj.bias
        return y_btd if bias is None else y_btd + jnp.einsum("btc,btcd->btd", weight_btc, take(bias[...], index_btc))

    def in_blocks(self, x_btd: Array, weight_btc: Array, index_btc: Array, cores: int) -> Array:
        """By blocks of rows that share an expert, one after the other.

        Until a token's rows are added up, each core's part of the width is an entry of an axis of its own: the sum over
        cores is then an all-reduce of tokens, not of rows.
        """
        (b, t, d), c = x_btd.shape, index_btc.shape[-1]
        placed = blocks.place(index_btc.reshape(-1), self.count)
        x_td, weight_r = x_btd.reshape(-1, d), weight_btc.reshape(-1)

        def block(_: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
            expert, row_z = inputs
            x_zd, weight_z1 = take(x_td, row_z // c), take(weight_r, row_z)[:, None]
            hidden_zm = self._weighted(self.gate_proj.one(x_zd, expert), self.up_proj.one(x_zd, expert), weight_z1)
            down_md = self.down_proj.matrices(x_btd.dtype, expert)
            hidden_zpm, down_pmd = hidden_zm.reshape(len(row_z), cores, -1), down_md.reshape(cores, -1, d)
            return None, jnp.einsum("zpm,pmd->pzd", hidden_zpm, down_pmd)

        _, y_qpzd = jax.lax.scan(block, None, (placed.expert_q, placed.row_qz))
        y_psd = jnp.moveaxis(y_qpzd, 1, 0).reshape(cores, -1, d)
        y_prd = y_psd.at[:, placed.place_r].get(mode="promise_in_bounds")
        y_pbtd = y_prd.reshape(cores, b, t, c, d).sum(3)
        y_btd = jax.lax.reduce(y_pbtd, jnp.zeros((), y_pbtd.dtype), jax.lax.add, (0,))  # .sum reduces float32
        return self._biased(y_btd, self._weights(weight_btc, index_btc))

    def one(self, x_rd: Array, weight_r: Array, expert: Array) -> Array:
        """The outputs of one expert for rows of tokens, times their weights: [r, d]."""
        gate_rm, up_rm = self.gate_proj.one(x_rd, expert), self.up_proj.one(x_rd, expert)
        if not self.weigh_input:
            return self.down_proj.one(self.gated(gate_rm, up_rm), expert) * weight_r[:, None]
        return self.down_proj.one(self._weighted(gate_rm, up_rm, weight_r[:, None]), expert)

    def _weights(self, weight_btc: Array, index_btc: Array) -> Array:
        """Of every expert, 0 of those not chosen: [b, t, e]."""
        chosen_btce = index_btc[..., None] == jnp.arange(self.count, dtype=index_btc.dtype)
        return jnp.sum(jnp.where(chosen_btce, weight_btc[..., None], 0), axis=-2)

    def _biased(self, y_btd: Array, weight_bte: Array) -> Array:
        bias = self.down_proj.bias
        return y_btd if bias is None else y_btd + jnp.einsum("bte,ed->btd", weight_bte, bias[...])

    def _weighted(self, gate: Array, up: Array, weight: Array) -> Array:
        return self.gated(gate * weight, up * weight) if self.weigh_input else self.gated(gate, up) * weight


class MoE(nnx.Module):
    """The sum of the outputs of a token's experts, and of an expert that all tokens share."""

    def __init__(self, gate: nnx.Module, experts: Experts, shared_expert: nnx.Module | None = None):
        self.gate: Any = gate
        self.experts = experts
        self.shared_expert: Any = shared_expert

    def __call__(self, x_btd: Array) -> Array:
        y_btd = self.experts(x_btd, *self.gate(x_btd))
        return y_btd if self.shared_expert is None else y_btd + self.shared_expert(x_btd)


class SharedExpert(GatedMLP):
    """A GatedMLP times sigmoid(gate(x)): its features are multiplied, so that one all-reduce sums all experts."""

    def __init__(self, sizes: Mapping[str, int], act: str, *, rngs: nnx.Rngs):
        super().__init__(sizes, act, bias=False, rngs=rngs)
        self.gate = Linear((sizes["d"],), (1,), bias=False, rngs=rngs)

    def hidden(self, x_btd: Array) -> Array:
        return super().hidden(x_btd) * jax.nn.sigmoid(self.gate(x_btd))
