"""Attention over slots against a plain formula in float64: at decode, chunks and whole prompts, in both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import FORMULATION, table

from jx_neuron.nn.attention import attend
from jx_neuron.nn.ops import using
from jx_neuron.nn.state import PLAIN, positions_of
from jx_neuron.runtime.cpu import ops
from jx_neuron.runtime.cpu.layout import CPU

N, K, H, S, SLOTS, POSITIONS = 6, 3, 8, 16, 4, 20
START = {"decode": [9, 0, 15], "chunk": [3, 0, 11], "padded beyond": [15, 9, 13], "prompt": [0, 0, 0]}
TOKENS = {"decode": 1, "chunk": 5, "padded beyond": 5, "prompt": S}
LENGTH = {"decode": [1, 1, 1], "chunk": [5, 2, 5], "padded beyond": [1, 5, 3], "prompt": [16, 1, 7]}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.9},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "soft cap": {"soft_cap": 0.7},
    "sinks": {"sinks_n": np.linspace(-1, 2, N)},
    "bias": {"bias_ns": -np.outer(2.0 ** -np.arange(1, N + 1), np.arange(S)[::-1])},
    "all": {
        "scale": 0.9,
        "window": 4,
        "soft_cap": 0.7,
        "sinks_n": np.linspace(2, -1, N),
        "bias_ns": np.sin(np.arange(N * S)).reshape(N, S),
    },
}


def expected(q_tnh, k_skh, v_skh, start, scale=H**-0.5, window=None, soft_cap=None, sinks_n=None, bias_ns=None):
    """One sequence, token by token and head by head; keys and values of its positions."""
    out_tnh = np.zeros(q_tnh.shape)
    for t, q_nh in enumerate(q_tnh):
        last = start + t
        first = 0 if window is None else max(0, last - window + 1)
        for n, q_h in enumerate(q_nh):
            k_sh, v_sh = (x_skh[first : last + 1, n // (N // K)] for x_skh in (k_skh, v_skh))
            score_s = scale * k_sh @ q_h
            if soft_cap is not None:
                score_s = soft_cap * np.tanh(score_s / soft_cap)
            if bias_ns is not None:
                score_s = score_s + bias_ns[n, first : last + 1]
            weight_s = np.exp(score_s)
            out_tnh[t, n] = weight_s @ v_sh / (weight_s.sum() + (0 if sinks_n is None else np.exp(sinks_n[n])))
    return out_tnh


@pytest.mark.few(16)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", START)
@pytest.mark.parametrize(
    ("layout", "block"), [(PLAIN, 0), (CPU, ops.BLOCK), (CPU, 2)], ids=["plain", "cpu", "cpu in blocks"]
)
def test_attention_is_the_formula_s(layout, block, kind, options, monkeypatch) -> None:
    monkeypatch.setattr(ops, "BLOCK", block)
    rng, tokens = np.random.default_rng(0), TOKENS[kind]
    start_b, length_b = START[kind], LENGTH[kind]
    slot_b = [0, 1, 2] if kind == "decode" else [2, 0, 3]
    k_bskh, v_bskh = (rng.normal(size=(3, S, K, H)) for _ in "kv")
    q_btnh = rng.normal(size=(3, tokens, N, H))

    def run(k_bskh, v_bskh, q_btnh):
        # what is there beyond each row's tokens is of another sequence, and no row may see it
        state = table(layout, (SLOTS, K, POSITIONS, H), fill=7.0)
        slots = jnp.asarray(slot_b, jnp.int32)
        past = positions_of(jnp.zeros(3, jnp.int32), jnp.asarray(start_b, jnp.int32), slots, S, S)
        part = state.of_layer(1).write(past, k=k_bskh, v=v_bskh)
        index_bt = jnp.minimum(jnp.asarray(start_b)[:, None] + jnp.arange(tokens), S - 1)[..., None, None]
        k_btkh, v_btkh = (jnp.take_along_axis(x_bskh, index_bt, axis=1) for x_bskh in (k_bskh, v_bskh))
        start, length = (jnp.asarray(x, jnp.int32) for x in (start_b, length_b))
        at = positions_of(start, length, None if kind == "decode" else slots, tokens, S)
        arrays = {name: jnp.asarray(x, jnp.float32) if np.ndim(x) else x for name, x in options.items()}
        return attend(q_btnh, k_btkh, v_btkh, part, at, **arrays)[0]

    def traced(*arrays):
        if layout is PLAIN:
            return run(*arrays)
        with using(ops.CpuOps(FORMULATION)):
            return run(*arrays)

    out_btnh = jax.jit(traced)(*(jnp.asarray(x, jnp.float32) for x in (k_bskh, v_bskh, q_btnh)))
    for row, (start, length) in enumerate(zip(start_b, length_b, strict=True)):
        right_tnh = expected(q_btnh[row, :length], k_bskh[row], v_bskh[row], start, **options)
        np.testing.assert_allclose(out_btnh[row, :length], right_tnh, atol=5e-6)
