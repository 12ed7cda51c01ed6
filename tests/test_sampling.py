"""The sampler against exact distributions, and against the order in which HF applies temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jx_neuron.nn.sampling import Sampling, candidates, greedy, sample
from jx_neuron.nn.sharding import mesh

DRAWS = 20_000
VOCAB = 48


def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)


def exact(logits_v: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities after HF's TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper, in float64."""
    x = logits_v.astype(np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    keep = np.zeros(VOCAB, bool)
    keep[order[: top_k or VOCAB]] = True
    p = np.where(keep, np.exp(x - x.max()), 0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    keep[order[before >= top_p]] = False
    p = np.where(keep, p, 0)
    return p / p.sum()


def draw(logits_v: np.ndarray, temperature: float, top_k: int, top_p: float, count: int, shards: int = 1) -> np.ndarray:
    n = DRAWS
    by = Sampling(
        jnp.full(n, temperature, jnp.float32),
        jnp.full(n, top_k, jnp.int32),
        jnp.full(n, top_p, jnp.float32),
        jnp.asarray(np.random.default_rng(1).random(n, np.float32)),
    )
    with jax.set_mesh(mesh(shards)):
        return np.asarray(jax.jit(sample, static_argnums=(2, 3))(jnp.tile(logits_v, (n, 1)), by, count, shards))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "count"),
    [
        (1.0, 0, 1.0, VOCAB),
        (0.7, 0, 1.0, VOCAB),
        (1.8, 0, 1.0, VOCAB),
        (1.0, 5, 1.0, 16),
        (1.0, 16, 1.0, 16),
        (1.0, 0, 0.8, VOCAB),
        (0.9, 12, 0.6, 16),
        (3.0, 40, 0.95, VOCAB),
    ],
)
def test_draws_follow_the_exact_distribution(temperature: float, top_k: int, top_p: float, count: int) -> None:
    p = exact(logits(), temperature, top_k, top_p)
    drawn = np.bincount(draw(logits(), temperature, top_k, top_p, count), minlength=VOCAB)
    assert drawn[p == 0].sum() == 0
    often = p * DRAWS >= 5
    observed = [*drawn[often], drawn[~often & (p > 0)].sum()]
    expected = [*(p[often] * DRAWS), p[~often].sum() * DRAWS]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, np.array(expected) * (sum(observed) / sum(expected))).pvalue > 1e-3


def test_the_test_would_notice_a_wrong_temperature() -> None:
    p = exact(logits(), 1.0, 0, 1.0)
    drawn = np.bincount(draw(logits(), 1.1, 0, 1.0, VOCAB), minlength=VOCAB)
    assert chisquare(drawn, p * DRAWS).pvalue < 1e-6


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_change_no_draw(shards: int) -> None:
    for top_k, top_p, count in [(0, 1.0, VOCAB), (7, 0.9, 8), (1, 1.0, 8)]:
        alone = draw(logits(), 0.8, top_k, top_p, count)
        np.testing.assert_array_equal(alone, draw(logits(), 0.8, top_k, top_p, count, shards))


def test_rows_have_parameters_of_their_own() -> None:
    x = jnp.tile(logits(), (3, 1))
    by = Sampling(jnp.array([1.0, 5.0, 1.0]), jnp.array([1, 0, 0]), jnp.array([1.0, 1.0, 1e-6]), jnp.full(3, 0.999))
    got = np.asarray(sample(x, by, VOCAB))
    best, least = logits().argmax(), logits().argmin()
    assert got[0] == best
    assert got[2] == best
    assert got[1] not in (best,)
    hot = exact(logits(), 5.0, 0, 1.0)
    assert hot[got[1]] > 0
    assert np.cumsum(hot[np.argsort(-hot)])[np.where(np.argsort(-hot) == got[1])[0][0]] >= 0.999
    assert got[1] != least or hot[least] > 0.001


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_greedy_and_candidates_take_the_first_of_equals(shards: int) -> None:
    x = np.zeros((3, VOCAB), np.float32)
    x[0, [7, 30]] = 2.0
    x[1, [47]] = 1.0
    with jax.set_mesh(mesh(shards)):
        np.testing.assert_array_equal(np.asarray(jax.jit(greedy, static_argnums=1)(x, shards)), x.argmax(-1))
        value, token = jax.jit(candidates, static_argnums=(1, 2))(x, 5, shards)
    expected = np.argsort(-x, axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(np.asarray(token), expected)
    np.testing.assert_array_equal(np.asarray(value), np.take_along_axis(x, expected, -1))


def test_a_uniform_number_of_almost_one_stays_inside() -> None:
    by = Sampling(
        jnp.ones(2),
        jnp.array([3, 0]),
        jnp.array([1.0, 0.5]),
        jnp.full(2, np.nextafter(np.float32(1), np.float32(0))),
    )
    got = np.asarray(sample(jnp.tile(logits(), (2, 1)), by, VOCAB))
    order = np.argsort(-logits(), kind="stable")
    assert got[0] == order[2]
    assert exact(logits(), 1.0, 0, 0.5)[got[1]] > 0
