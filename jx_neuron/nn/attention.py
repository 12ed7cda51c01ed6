"""Attention over the state of a slot. Array suffixes are those of jx_neuron.nn.layers, g query heads of a key head."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jx_neuron.nn.ops import ops
from jx_neuron.nn.positions import earlier, later
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Queries:
    """The queries of a step, in blocks that see no positions after the last of them.

    blocks:      those of `Ops.query_blocks`.
    position_bt: the position of each query, as `arrange` orders them.
    late_b:      how much earlier `arrange` has each row begin, so that the last query, of padding perhaps, is at the
                 last position or before it; None where every row does.
    """

    blocks: list[tuple[int, int, int]]
    position_bt: Array
    late_b: Array | None

    @classmethod
    def of(cls, state: LayerState, at: Positions, positions: int) -> "Queries":
        """The queries of `at`, which attend to that number of positions of `state`."""
        t = at.position_bt.shape[1]
        blocks = ops().query_blocks(t, positions)
        if len(blocks) == 1 or t == positions or state.is_ring(at):
            return cls(blocks, at.position_bt, None)
        late_b = at.late_b(positions)
        return cls(blocks, at.position_bt - late_b[:, None], late_b)

    def arrange(self, q_bt: Array) -> Array:
        """q [b, t, …] in the order of `position_bt`."""
        return q_bt if self.late_b is None else later(q_bt, self.late_b)

    def restore(self, a_bt: Array) -> Array:
        """The step's order of a [b, t, …], which is in that of `position_bt`."""
        return a_bt if self.late_b is None else earlier(a_bt, self.late_b)


def alibi_bias(slopes_n: Array, at: Positions, dtype: DTypeLike = jnp.float32) -> Array:
    """ALiBi as `attend` adds it to scores: slope · position, [n, s], in `dtype` (Press et al., arXiv:2108.12409)."""
    return slopes_n.astype(dtype)[:, None] * jnp.arange(at.positions, dtype=dtype)


def attend(
    q_btnh: Array,
    k_btkh: Array | None,
    v_btkh: Array | None,
    state: LayerState,
    at: Positions,
    scale: float | None = None,
    *,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks_n: Array | None = None,
    bias_ns: Array | None = None,
) -> tuple[Array, LayerState]:
    """Writes keys and values to the state, then attends to the positions that `at` allows.

    softmax(scale · q · kᵀ + bias) · v with `scale` 1/√h unless given; query head n reads key/value head n // (N/K)
    (grouped-query attention, Ainslie et al., arXiv:2305.13245). Scores and softmax are float32.

    Keys and values are None in a layer that writes none, and attends to those of another (`Config.own_state`).

    window:   attends to the last `window` positions, including the token's own (HF's sliding_window).
    chunk:    attends to the positions of the token's own chunk, of this length (HF's attention_chunk_size).
    soft_cap: scores become cap · tanh(scores / cap), before the bias (Gemma 2, arXiv:2408.00118).
    sinks_n:  a logit of each head [n] that takes part in the softmax and has no value (gpt-oss, arXiv:2309.17453).
    bias_ns:  added to the scores of each head and position, [n, s] for all s of `at.positions` (ALiBi,
              arXiv:2108.12409: softmax is the same for slope · position as for slope · distance).

    Returns the attention output [b, t, n, h] and the state written to.
    """
    if k_btkh is None or v_btkh is None:
        entries, position_bs = state.seen(at, "k", "v")
    else:
        (entries, position_bs), state = state.extend(at, k=k_btkh, v=v_btkh)
    k_bksh, v_bksh = entries["k"], entries["v"]
    (b, t, n, h), k = q_btnh.shape, k_bksh.shape[1]
    s = k_bksh.shape[2]
    q_btkgh = q_btnh.reshape(b, t, k, n // k, h) * jnp.asarray(
        1 / math.sqrt(h) if scale is None else scale, q_btnh.dtype
    )
    queries = Queries.of(state, at, s)
    q_btkgh, position_bt = queries.arrange(q_btkgh), queries.position_bt
    mask_bts = position_bs[:, None] <= position_bt[:, :, None]
    if window is not None:
        mask_bts &= position_bs[:, None] > position_bt[:, :, None] - window
    if chunk is not None:
        first_bt = position_bt - lax.rem(position_bt, jnp.int32(chunk))
        mask_bts &= position_bs[:, None] >= first_bt[:, :, None]
    if state.is_ring(at):
        mask_bts &= position_bs[:, None] >= 0
    if bias_ns is not None:
        bias_bns = bias_ns[:, position_bs].swapaxes(0, 1) if state.is_ring(at) else bias_ns[None]
        bias_bkg1s = bias_bns.astype(jnp.float32).reshape(-1, k, n // k, 1, s)
    parts = []
    if len(queries.blocks) > 1:
        k_bksh, v_bksh = ops().once((k_bksh, v_bksh))
    for first, last, seen in queries.blocks:
        w_bkgts = ops().attention_scores(q_btkgh[:, first:last], k_bksh[:, :, :seen])
        if soft_cap is not None:
            w_bkgts = soft_cap * jnp.tanh(w_bkgts / soft_cap)
        if bias_ns is not None:
            w_bkgts += bias_bkg1s[..., :seen]
        w_bkgts = jnp.where(mask_bts[:, None, None, first:last, :seen], w_bkgts, jnp.finfo(jnp.float32).min)
        v_bksh_seen = v_bksh[:, :, :seen]
        if sinks_n is not None:  # a position more, whose value is zero
            sink_bkgt1 = jnp.broadcast_to(
                sinks_n.astype(jnp.float32).reshape(1, k, n // k, 1, 1), (*w_bkgts.shape[:-1], 1)
            )
            w_bkgts = jnp.concatenate([w_bkgts, sink_bkgt1], axis=-1)
            v_bksh_seen = jax.tree.map(partial(_one_more, axis=2), v_bksh_seen)
        parts.append(ops().attention_values(w_bkgts, v_bksh_seen))
    return queries.restore(jnp.concatenate(parts, axis=1)).reshape(b, t, n, h), state


def _one_more(x: Array, axis: int) -> Array:
    """x with zeros behind the last entry of an axis."""
    return jnp.pad(x, [(0, int(number == axis)) for number in range(x.ndim)])
