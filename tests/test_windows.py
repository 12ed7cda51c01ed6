"""Layers with a window keep no more than it: rings, written and read at any start, beside layers that keep all."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import FORMULATION, filled, table

from jx_neuron.nn.attention import attend
from jx_neuron.nn.layout import KV, PLAIN, Kept
from jx_neuron.nn.ops import using
from jx_neuron.nn.positions import positions_of
from jx_neuron.nn.state import joined
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.cpu.ops import CpuOps

S, SLOTS, K, G, H = 24, 3, 2, 2, 4
WINDOWS = (5, None, 5, 7, 5, None, 5)
OWN = (True,) * 4 + (False,) * 3  # the last layers read what those before them wrote: layers 2 and 1
WRITER = (0, 1, 2, 3, 2, 1, 2)
BIAS_NS = jnp.asarray(0.3 * np.random.default_rng(1).normal(size=(K * G, S)), jnp.float32)


def expected(q_snh, k_skh, v_skh, window) -> np.ndarray:
    """Attention of a whole sequence, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_snh, np.repeat(k_skh, G, 1), np.repeat(v_skh, G, 1)))
    w_nts = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H) + BIAS_NS[:, None]
    distance_ts = np.arange(S)[:, None] - np.arange(S)
    w_nts = np.where((distance_ts >= 0) & (distance_ts < (window or S)), w_nts, -np.inf)
    p_nts = np.exp(w_nts - w_nts.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", p_nts / p_nts.sum(-1, keepdims=True), v)


def grid(state, at, arrays_bts):
    """Each layer's attention output [l, b, t, n, h], and the state."""
    outputs = []
    for layer, (q, k, v) in enumerate(zip(*arrays_bts, strict=True)):
        new = (k, v) if OWN[layer] else (None, None)
        out, part = attend(
            q, *new, state.of_layer(layer), at, window=WINDOWS[layer], bias_ns=BIAS_NS[:, : at.positions]
        )
        state = part.state
        outputs.append(out)
    return jnp.stack(outputs), joined(state)


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [PLAIN, CPU], ids=["plain", "cpu"])
@pytest.mark.parametrize("first", [6, 3], ids=["whole prompts beyond the window", "within it"])
def test_sequences_go_on_beyond_their_windows(layout, first) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(len(WINDOWS), SLOTS, S, heads, H)).astype(np.float32) for heads in (K * G, K, K))
    right = [
        [expected(q[i, b], k[of, b], v[of, b], window) for b in range(SLOTS)]
        for i, (window, of) in enumerate(zip(WINDOWS, WRITER, strict=True))
    ]
    sizes = ((K, 0, H), (K, 0, H))
    state = filled(layout, [Kept(KV, sizes, window, own) for window, own in zip(WINDOWS, OWN, strict=True)], SLOTS, S)
    arrays = [
        (array, layout.position_axis(row))
        for group, rows in zip(state.arrays, state.rows, strict=True)
        for array, row in zip(group, rows, strict=True)
    ]
    assert {array.shape[axis] for array, axis in arrays} == {5, 7, S}
    assert sum(array.size for array, _ in arrays) == 2 * SLOTS * K * H * (5 + S + 5 + 7)
    run = jax.jit(grid, donate_argnums=0)
    done = np.zeros(SLOTS, int)  # tokens of each slot

    def step(slots, t, counts, positions) -> None:
        nonlocal state
        start_b, slot_b = done[slots], None if t == 1 else jnp.asarray(slots, jnp.int32)
        index_bt = np.minimum(start_b[:, None] + np.arange(t), S - 1)
        arrays = [x[:, np.asarray(slots)[:, None], index_bt] for x in (q, k, v)]
        at = positions_of(jnp.asarray(start_b, jnp.int32), jnp.asarray(counts, jnp.int32), slot_b, t, positions)
        with using(CpuOps(FORMULATION)) if layout is CPU else nullcontext():
            outputs, state = run(state, at, arrays)
        for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            for layer in range(len(WINDOWS)):
                wanted = right[layer][slot][done[slot] : done[slot] + count]
                np.testing.assert_allclose(outputs[layer, row, :count], wanted, atol=2e-5)
            done[slot] += count

    step([2, 0], first, [first, first - 2], first)
    for _ in range(12):
        if rng.random() < 0.5:
            step([0, 1, 2], 1, rng.integers(0, 2, 3) * (done < S), S)
        else:
            slots = rng.permutation(3)[: rng.integers(1, 4)]
            counts = np.minimum(rng.integers(0, 5, len(slots)), np.maximum(S - done[slots], 0))
            step(slots.tolist(), 4, counts, S)
    assert (done > min(filter(None, WINDOWS))).all(), done


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [PLAIN, CPU], ids=["plain", "cpu"])
def test_a_table_grows_while_its_sequences_are_within_the_window(layout) -> None:
    state = table(layout, (2, K, 4, H), layers=2, windows=(6, None))
    new = np.random.default_rng(0).normal(size=(2, 4, K, H)).astype(np.float32)
    at = positions_of(jnp.zeros(2, jnp.int32), jnp.full(2, 4, jnp.int32), jnp.arange(2), 4, 4)
    for layer in range(2):
        state = state.of_layer(layer).write(at, k=new, v=new).state
    state = state.resize(3, 9)
    at = positions_of(jnp.full(3, 4, jnp.int32), jnp.ones(3, jnp.int32), None, 1, 9)
    for layer, size in enumerate((6, 9)):
        read = state.of_layer(layer).read("k", at)
        assert read.shape == (3, K, size, H)
        np.testing.assert_array_equal(np.asarray(read)[:2, :, :4], new.swapaxes(1, 2))
        position_bs = np.broadcast_to(state.of_layer(layer).position_bs(at, written=False), (3, size))
        assert position_bs[0, :4].tolist() == [0, 1, 2, 3]
