"""Rows of tokens in blocks that share an expert: of static shapes, and without a sort.

Array suffixes: e experts, r rows, one for each expert of each token, q blocks, z the rows of a block.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

SIZE = 128
"""Rows of a block. While a NeuronCore reads one number of 16 bits, it multiplies about 50 times at the rate of
published prefills (jx_neuron.planning.speed), and 220 times at its peak: a block is multiplied in about the time in
which its expert's matrices are read."""


def count(rows: int, experts: int) -> int:
    """The most blocks that rows can take: one of each expert may be full in part."""
    return (rows + experts * (SIZE - 1)) // SIZE


def pay(tokens: int, chosen: int, experts: int, width: int) -> bool:
    """Whether blocks take less time than each token by every expert, of whose width each core has `width`.

    A row of a block is read, and is written and read again as a result: three numbers are moved for three times `width`
    multiplications, each in the time of `SIZE` more (docs/notes/experts.md).
    """
    return count(tokens * chosen, experts) * SIZE * (width + SIZE) <= tokens * experts * width


class Placed(NamedTuple):
    """The expert of each block, the row at each place in it, 0 where there is none, and each row's place among all."""

    expert_q: Array
    row_qz: Array
    place_r: Array


def place(expert_r: Array, experts: int) -> Placed:
    """Blocks of rows that have these experts, in the order of experts, and of rows within one."""
    rows, blocks = len(expert_r), count(len(expert_r), experts)
    has_re = (expert_r[:, None] == jnp.arange(experts, dtype=expert_r.dtype)).astype(jnp.float32)
    blocks_e = jnp.ceil(has_re.sum(0) / SIZE)
    end_e = jnp.sum(jnp.where(np.tri(experts, dtype=bool), blocks_e, 0), axis=-1)
    place_re = _before(has_re) + (end_e - blocks_e) * SIZE
    place_r = jnp.sum(has_re * place_re, axis=-1).astype(jnp.int32)
    ended_qe = end_e <= jnp.arange(blocks, dtype=jnp.float32)[:, None]
    expert_q = jnp.minimum(jnp.sum(ended_qe, axis=-1, dtype=jnp.int32), experts - 1)
    row_p = jnp.zeros(blocks * SIZE, jnp.int32)
    row_p = row_p.at[place_r].set(jnp.arange(rows, dtype=jnp.int32), mode="promise_in_bounds", unique_indices=True)
    return Placed(expert_q, row_p.reshape(blocks, SIZE), place_r)


def _before(has_re: Array) -> Array:
    """How many of the rows before each have the expert; sums within parts and over parts are products with a triangle,
    exact where 16 bits hold what they multiply."""
    rows, experts = has_re.shape
    has_pre = has_re.reshape(-1, math.gcd(rows, SIZE), experts)
    parts, size, _ = has_pre.shape
    within_pre = jnp.einsum("rs,pse->pre", np.tri(size, k=-1, dtype=np.float32), has_pre)
    before_pe = jnp.einsum("pq,qe->pe", np.tri(parts, k=-1, dtype=np.float32), has_pre.sum(1))
    return (within_pre + before_pe[:, None]).reshape(rows, experts)
