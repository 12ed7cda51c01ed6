"""The cost model counts what a program reads more than once, and what it only puts elsewhere."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jx_neuron.lowering import Cost, lower
from jx_neuron.nn.ops import PLAIN

X_BD, TABLE_VD = np.zeros((2, 16), np.float32), np.zeros((64, 16), np.float32)


def cost(fn: Callable[..., object], *args: object) -> Cost:
    return lower(fn, *args).cost()


def test_each_product_reads_its_matrix() -> None:
    once = cost(lambda x, w: x @ w.T, X_BD, TABLE_VD)
    twice = cost(lambda x, w: jnp.tanh(x @ w.T) @ w, X_BD, TABLE_VD)
    assert once.bytes_read == X_BD.nbytes + TABLE_VD.nbytes
    assert twice.bytes_read == X_BD.nbytes + 2 * TABLE_VD.nbytes


def test_a_table_that_is_also_the_head_is_read_whole_and_by_the_rows_looked_up() -> None:
    index_b = np.array([3, 5, 7], np.int32)
    found = cost(lambda w, i: w.at[i].get(mode="clip") @ w.T, TABLE_VD, index_b)
    assert found.bytes_read == TABLE_VD.nbytes + 3 * 16 * 4 + index_b.nbytes


def test_elementwise_uses_read_an_input_once_together() -> None:
    assert cost(lambda x: jnp.tanh(x) + x * x, X_BD).bytes_read == X_BD.nbytes


def test_the_body_of_a_loop_counts_as_often_as_it_runs() -> None:
    w_nkk, index_t = np.zeros((5, 16, 16), np.float32), np.zeros(7, np.int32)

    def each(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w_kk: (x @ w_kk, None), x, w)[0]

    def same(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ w[0], x)

    def chosen(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, n: (x @ w.at[n].get(mode="promise_in_bounds"), None), x, index)[0]

    once = 2 * X_BD.size * 16, w_nkk.nbytes // 5
    for fn, args, turns in ((each, (), 5), (same, (), 7), (chosen, (index_t,), 7)):
        found = cost(fn, X_BD, w_nkk, *args)
        assert found.flops == turns * once[0]
        read = found.bytes_read - X_BD.nbytes - sum(array.nbytes for array in args)
        assert read == turns * once[1], fn


@pytest.mark.parametrize(
    ("fn", "moved"),
    [
        (lambda x: x + 1, 0),
        (lambda x: jnp.concatenate([x, 2 * x]), 2 * X_BD.nbytes),
        (lambda x: jnp.pad(x, ((0, 2), (0, 0))), 2 * X_BD.nbytes),
        (lambda x: x[::-1], X_BD.nbytes),
        (lambda x: x.T + 1, X_BD.nbytes),
        (lambda x: x.reshape(2, 1, 16).swapaxes(0, 1) + 1, 0),
    ],
    ids=["elementwise", "concatenate", "pad", "reverse", "transpose", "transpose-of-one"],
)
def test_what_is_only_put_elsewhere(fn: Callable[..., object], moved: int) -> None:
    assert cost(fn, X_BD).bytes_moved == moved


@pytest.mark.parametrize("group", [1, 4])
def test_attention_of_a_step_leaves_scores_and_cache_where_they_are(group: int) -> None:
    q_btkgh, k_bksh = np.zeros((2, 1, 3, group, 8), np.float32), np.zeros((2, 3, 64, 8), np.float32)
    assert cost(PLAIN.attention_scores, q_btkgh, k_bksh).bytes_moved == 0
    assert cost(PLAIN.attention_values, np.zeros((2, 3, group, 1, 64), np.float32), k_bksh).bytes_moved == 0
