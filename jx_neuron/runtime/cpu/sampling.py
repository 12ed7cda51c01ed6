"""Draws as one CPU computes them fastest.

XLA sorts integers four times as fast as pairs of a number and its index. So numbers alone are sorted, a few of the
largest first, and the token of the one that is drawn is looked up.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from jx_neuron.nn.sampling import NOT_FINITE, Sampling, are_finite, argmax

SMALL = 4096
"""Of a vocabulary up to this, pairs are sorted in less time than it takes to compile more."""

FEW = 512
"""Candidates among which a token of the whole vocabulary is looked for first."""


def sample(logits_bv: Array, by: Sampling, count: int) -> Array:
    """As `jx_neuron.nn.sampling.sample`. A row's token depends on no other row.

    Nothing is sorted where every row takes its most likely token. The whole vocabulary is sorted only where a row draws
    from every token, and none of the FEW most likely.
    """
    logits_bv = logits_bv.astype(jnp.float32)
    greedy = (by.top_k_b == 1).all()
    token_b = lax.cond(greedy, lambda: argmax(logits_bv), lambda: _sorted_sample(logits_bv, by, count))
    return jnp.where(are_finite(logits_bv), token_b, NOT_FINITE)


def _sorted_sample(logits_bv: Array, by: Sampling, count: int) -> Array:
    v = logits_bv.shape[-1]
    if count < v:
        value_b, rank_b, _ = _draw(_largest(logits_bv, count), by)
    else:
        scaled_bv = (logits_bv - logits_bv.max(-1, keepdims=True)) / by.temperature_b[:, None]
        *few, among_b = _draw(_largest(logits_bv, min(FEW, v)), by, jnp.exp(scaled_bv).sum(-1))

        def of_all() -> list[Array]:
            *drawn, _ = _draw(_descending(logits_bv), by)
            return [jnp.where(among_b, x_b, y_b) for x_b, y_b in zip(few, drawn, strict=True)]

        value_b, rank_b = lax.cond(among_b.all(), lambda: few, of_all)
    return _token(logits_bv, value_b, rank_b)


def _draw(value_bk: Array, by: Sampling, total_b: Array | None = None) -> tuple[Array, Array, Array]:
    """The logit that each row draws from its largest, its rank among equal ones, and whether it is right.

    total_b: the weight of all candidates, where there are more than those of `value_bk`; then the logit is right where
             these decide it.
    """
    count = value_bk.shape[-1]
    rank_k = jnp.arange(count, dtype=jnp.int32)
    limited_b = (by.top_k_b > 0) & (by.top_k_b <= count)
    weight_bk = jnp.exp((value_bk - value_bk[:, :1]) / by.temperature_b[:, None])
    weight_bk = jnp.where(limited_b[:, None] & (rank_k >= by.top_k_b[:, None]), 0.0, weight_bk)
    sum_bk = jnp.cumsum(weight_bk, -1)
    whole_b = sum_bk[:, -1]
    if total_b is not None:
        whole_b = jnp.where(limited_b, whole_b, jnp.where(by.top_k_b == 0, total_b, jnp.inf))
    nucleus_b = by.top_p_b * whole_b
    kept_bk = (sum_bk - weight_bk < nucleus_b[:, None]) & (weight_bk > 0)
    ends_b = limited_b | (sum_bk[:, -1] >= nucleus_b)
    kept_b = jnp.where(ends_b, jnp.where(kept_bk, sum_bk, 0.0).max(-1), whole_b)
    reached_b = (sum_bk <= (by.uniform_b * kept_b)[:, None]).sum(-1, dtype=jnp.int32)
    at_b = jnp.minimum(reached_b, kept_bk.sum(-1, dtype=jnp.int32) - 1)
    drawn_b1 = jnp.take_along_axis(value_bk, at_b[:, None], axis=-1, mode="clip")
    rank_b = at_b - (value_bk > drawn_b1).sum(-1, dtype=jnp.int32)
    return drawn_b1[:, 0], rank_b, ends_b | ((by.top_p_b >= 1) & (reached_b < count))


def _largest(x_bv: Array, count: int) -> Array:
    """The `count` largest numbers of each row, largest first.

    They are in the `count` groups whose own largest are largest, so these are sorted first.
    """
    b, v = x_bv.shape
    size = max(1, round(math.sqrt(v / count)))
    groups = -(-v // size)
    if groups <= count:
        return _descending(x_bv)[:, :count]
    x_bgi = jnp.pad(x_bv, ((0, 0), (0, groups * size - v)), constant_values=-jnp.inf).reshape(b, groups, size)
    most_bg = x_bgi.max(-1)
    least_b1 = _descending(most_bg)[:, count - 1 : count]
    above_bg, equal_bg = most_bg > least_b1, most_bg == least_b1
    room_b1 = count - above_bg.sum(-1, keepdims=True, dtype=jnp.int32)
    chosen_bg = above_bg | (equal_bg & (jnp.cumsum(equal_bg, -1, dtype=jnp.int32) <= room_b1))
    place_bg = jnp.where(chosen_bg, jnp.cumsum(chosen_bg, -1, dtype=jnp.int32) - 1, count)
    group_bk = jnp.zeros((b, count), jnp.int32)
    group_bk = group_bk.at[jnp.arange(b)[:, None], place_bg].set(jnp.arange(groups, dtype=jnp.int32), mode="drop")
    of_groups_bki = jnp.take_along_axis(x_bgi, group_bk[:, :, None], axis=1, mode="clip")
    return _descending(of_groups_bki.reshape(b, -1))[:, :count]


def _descending(x_bv: Array) -> Array:
    """Each row, largest first: floats sort as the integers of their bits do, negative ones the other way round."""
    bits_bv = lax.bitcast_convert_type(x_bv, jnp.int32)
    ascending_bv = lax.sort(_flipped(bits_bv), dimension=-1, is_stable=False)
    return lax.bitcast_convert_type(_flipped(ascending_bv[:, ::-1]), jnp.float32)


def _flipped(bits: Array) -> Array:
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _token(x_bv: Array, value_b: Array, rank_b: Array) -> Array:
    """Where each row has a number, of several places the one of that rank."""
    equal_bv = x_bv == value_b[:, None]
    v = x_bv.shape[-1]

    def by_rank() -> Array:
        return jnp.argmax(equal_bv & (jnp.cumsum(equal_bv, -1, dtype=jnp.int32) > rank_b[:, None]), -1)

    def first() -> Array:
        return jnp.where(equal_bv, jnp.arange(v, dtype=jnp.int32), v - 1).min(-1)

    return lax.cond((rank_b > 0).any(), by_rank, first).astype(jnp.int32)
