"""The sampler against exact distributions, and against the order in which HF applies temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jx_neuron.nn.sampling import NOT_FINITE, Sampling, candidates, greedy, sample
from jx_neuron.nn.sharding import mesh
from jx_neuron.runtime.cpu import sampling as cpu_sampling

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


@pytest.mark.few(2)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [8, 64, 5000])
def test_a_cpu_draws_the_same_tokens(count: int, ties: bool) -> None:
    rng = np.random.default_rng(count + ties)
    plain, fast = (jax.jit(function, static_argnums=2) for function in (sample, cpu_sampling.sample))
    differing = 0
    for spread in (0.01, 1, 4, 12):
        x = rng.normal(0, spread, (64, 5000)).astype(np.float32)
        x = np.abs(np.round(x * 2) / 2) if ties else x
        by = Sampling(
            rng.choice(np.float32([0.5, 1, 2]), 64),
            rng.choice(np.int32([0, 1, 5, 50, 600]), 64),
            rng.choice(np.float32([0.3, 0.9, 1]), 64),
            rng.random(64, np.float32),
        )
        expected, got = (np.asarray(function(x, by, count)) for function in (plain, fast))
        row = np.flatnonzero(expected != got)
        differing += len(row)  # where the sums of weights are rounded to another side of the uniform number
        assert (np.abs(x[row, expected[row]] - x[row, got[row]]) < 0.01).all()
        reversed_rows = Sampling(*(field[::-1] for field in by))
        np.testing.assert_array_equal(np.asarray(fast(x[::-1], reversed_rows, count))[::-1], got)
        greedy_rows = by._replace(top_k_b=np.ones(64, np.int32))
        np.testing.assert_array_equal(np.asarray(fast(x, greedy_rows, count)), x.argmax(-1))
    assert differing <= 2
    x[3, 7], x[5, 9] = np.nan, np.inf
    assert np.flatnonzero(np.asarray(fast(x, by, count)) == NOT_FINITE).tolist() == [3, 5]


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
