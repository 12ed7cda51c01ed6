"""From logits to the next token: a pure function of logits, per-row parameters and a uniform number per row.

The uniform numbers enter as data, so that one seed gives the same tokens whatever runs the program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jx_neuron.nn.sharding import AXIS

NOT_FINITE = -1  # the token of a row whose logits hold a NaN or an infinity


class Sampling(NamedTuple):
    """Parameters of each row.

    temperature_b: divides the logits; float32, above 0.
    top_k_b:       how many of the most likely tokens are kept; int32, 0 for all candidates.
    top_p_b:       of those, the fewest whose probabilities sum to at least this; float32 in (0, 1].
    uniform_b:     the draw, float32 in [0, 1).
    """

    temperature_b: Array
    top_k_b: Array
    top_p_b: Array
    uniform_b: Array


def argmax(logits_bv: Array) -> Array:
    """The first of the largest logits of each row, int32 [b].

    A maximum and a minimum, since Neuron has no reduction of two operands.
    """
    v = logits_bv.shape[-1]
    index_v = jnp.arange(v, dtype=jnp.int32)
    return jnp.where(logits_bv == logits_bv.max(-1, keepdims=True), index_v, v - 1).min(-1)


def candidates(logits_bv: Array, count: int, shards: int = 1) -> tuple[Array, Array]:
    """The `count` largest logits of each row and their tokens, both [b, count], largest first, ties by token.

    Each of `shards` vocabulary shards (over the mesh in scope, axis "tp") gives its own first, so that only
    shards · count candidates are gathered. Every token of a row whose logits are not all finite is NOT_FINITE.
    """
    if shards == 1:
        return _largest_if_finite(logits_bv, count)
    each = min(count, logits_bv.shape[-1] // shards)

    def of_shard(logits_bv: Array) -> tuple[Array, Array]:
        value_bk, token_bk = _largest_if_finite(logits_bv, each)
        first = jax.lax.axis_index(AXIS) * logits_bv.shape[-1]
        return value_bk, jnp.where(token_bk == NOT_FINITE, NOT_FINITE, token_bk + first)

    split = PartitionSpec(None, AXIS)
    gathered = jax.shard_map(of_shard, in_specs=split, out_specs=(split, split))(logits_bv)
    value_bk, token_bk = jax.lax.with_sharding_constraint(gathered, PartitionSpec())
    finite_b1 = token_bk.min(-1, keepdims=True) != NOT_FINITE
    value_bk, at_bk = _largest(value_bk, count)
    return value_bk, jnp.where(finite_b1, jnp.take_along_axis(token_bk, at_bk, axis=-1, mode="clip"), NOT_FINITE)


def _largest_if_finite(logits_bv: Array, count: int) -> tuple[Array, Array]:
    value_bk, token_bk = _largest(logits_bv, count)
    return value_bk, jnp.where(are_finite(logits_bv)[:, None], token_bk, NOT_FINITE)


def are_finite(logits_bv: Array) -> Array:
    """Whether all logits of a row are finite, bool [b]."""
    # comparisons, since backends differ in what a maximum makes of NaN
    finite_bv = (jnp.abs(logits_bv) <= jnp.finfo(logits_bv.dtype).max).astype(jnp.float32)
    return finite_bv.min(-1) > 0


def _largest(x_bv: Array, count: int) -> tuple[Array, Array]:
    if count > 1:
        value_bk, at_bk = jax.lax.top_k(x_bv, count)
        return value_bk, at_bk
    return x_bv.max(-1, keepdims=True), argmax(x_bv)[:, None]


def greedy(logits_bv: Array, shards: int = 1) -> Array:
    """The most likely token of each row, int32 [b], or NOT_FINITE."""
    return candidates(logits_bv, 1, shards)[1][:, 0]


def sample(logits_bv: Array, by: Sampling, count: int, shards: int = 1) -> Array:
    """Draws a token of each row, int32 [b], from its `count` most likely ones, or gives NOT_FINITE.

    Temperature, then top-k, then top-p (Holtzman et al., arXiv:1904.09751), as HF's logits processors apply them; the
    token is the first whose cumulative probability exceeds the uniform number.
    """
    value_bk, token_bk = candidates(logits_bv.astype(jnp.float32), count, shards)
    rank_k = jnp.arange(value_bk.shape[-1], dtype=jnp.int32)
    scaled_bk = (value_bk - value_bk[:, :1]) / by.temperature_b[:, None]
    limit_b = jnp.where(by.top_k_b > 0, by.top_k_b, value_bk.shape[-1])
    weight_bk = jnp.where(rank_k < limit_b[:, None], jnp.exp(scaled_bk), 0.0)
    before_bk = jnp.cumsum(weight_bk, -1) - weight_bk
    kept_bk = jnp.where(before_bk < by.top_p_b[:, None] * weight_bk.sum(-1, keepdims=True), weight_bk, 0.0)
    reached_bk = jnp.cumsum(kept_bk, -1) <= by.uniform_b[:, None] * kept_bk.sum(-1, keepdims=True)
    at_b = jnp.minimum(reached_bk.sum(-1, dtype=jnp.int32), (kept_bk > 0).sum(-1, dtype=jnp.int32) - 1)
    return jnp.take_along_axis(token_bk, at_b[:, None], axis=-1, mode="clip")[:, 0]
