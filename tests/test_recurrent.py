"""Recurrent layers: recurrences against a loop in float64, and what slots, chunks and padding make of their state."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
from families import OPTIONS, all_reduces
from jax import numpy as jnp
from steps import step_input
from test_families import random_model
from test_state import DECODE, PLACES, SEQUENCES, check, prefilled, same, slot
from test_state import runtime as runtime_of
from transformers import AutoConfig

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.nn.recurrent import CHUNK, gated_delta, ssd
from jx_neuron.planning.outline import Outline
from jx_neuron.step.program_key import ProgramKey

RECURRENT = "falcon_h1 granitemoehybrid lfm2 lfm2_moe mamba2 qwen3_5_moe_text qwen3_5_text qwen3_next".split()
B, G, Q, I, J = 2, 2, 3, 4, 5  # noqa: E741


def inputs(t: int, decay: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Of both recurrences; `decay` is the mean of -log."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(B, t, G, J))
    return dict(
        q=rng.normal(size=(B, t, G, J)),
        k=keys / np.linalg.norm(keys, axis=-1, keepdims=True),
        v=rng.normal(size=(B, t, G, Q, I)),
        log=-decay * rng.exponential(size=(B, t, G, Q)),
        beta=rng.uniform(size=(B, t, G, Q)),
        s=rng.normal(size=(B, G, Q, I, J)),
    )


def step_by_step(of: dict[str, np.ndarray], delta: bool) -> tuple[np.ndarray, np.ndarray]:
    s, outputs = of["s"].copy(), []
    for t in range(of["q"].shape[1]):
        q, k, v = of["q"][:, t, :, None], of["k"][:, t, :, None], of["v"][:, t]
        s = s * np.exp(of["log"][:, t])[..., None, None]
        if delta:
            v = of["beta"][:, t][..., None] * (v - (s * k[..., None, :]).sum(-1))
        s = s + v[..., None] * k[..., None, :]
        outputs.append((s * q[..., None, :]).sum(-1))
    return np.stack(outputs, axis=1), s


def in_chunks(of: dict[str, np.ndarray], delta: bool) -> tuple[np.ndarray, np.ndarray]:
    a = {name: jnp.asarray(array, jnp.float32) for name, array in of.items()}
    if delta:
        return jax.jit(gated_delta)(a["q"], a["k"], a["v"], a["log"], a["beta"], a["s"])
    return jax.jit(ssd)(a["v"], a["k"], a["q"], a["log"], a["s"])


@pytest.mark.few(8)
@pytest.mark.parametrize("delta", [False, True], ids=["ssd", "gated delta"])
@pytest.mark.parametrize("decay", [1e-3, 0.5, 100.0])
@pytest.mark.parametrize("t", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
def test_chunks_give_what_a_loop_gives(t: int, decay: float, delta: bool) -> None:
    of = inputs(t, decay)
    for found, expected in zip(in_chunks(of, delta), step_by_step(of, delta), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_key_that_comes_again_and_again_is_written_once() -> None:
    of = inputs(3 * CHUNK, 0.0)
    of |= dict(k=np.broadcast_to(of["k"][:, :1], of["k"].shape), beta=np.ones_like(of["beta"]))
    for found, expected in zip(in_chunks(of, True), step_by_step(of, True), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("delta", [False, True], ids=["ssd", "gated delta"])
def test_a_sequence_may_be_cut_at_every_token(delta: bool) -> None:
    """Each part ends in padding: zeros, which have no decay and add nothing."""
    t = CHUNK + 5
    of = inputs(t, 0.05)
    whole, state = step_by_step(of, delta)

    def run(part: slice, s: Any) -> tuple[np.ndarray, np.ndarray]:
        padded = {name: np.zeros_like(array) for name, array in of.items()}
        for name in padded.keys() - {"s"}:
            padded[name][:, : part.stop - part.start] = of[name][:, part]
        return in_chunks(padded | {"s": s}, delta)

    for cut in range(1, t):
        y, s = run(slice(0, cut), of["s"])
        z, s = run(slice(cut, t), s)
        y = np.concatenate([y[:, :cut], z[:, : t - cut]], axis=1)
        np.testing.assert_allclose(y, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
        np.testing.assert_allclose(s, state, rtol=0, atol=1e-5 * np.abs(state).max())


def families(usual: str) -> Any:
    """All of them, of which the others than `usual` are run as `slow`."""
    cases = [pytest.param(name, marks=[] if name == usual else pytest.mark.slow) for name in RECURRENT]
    return pytest.mark.parametrize("family", cases)


def original(family: str) -> Any:
    """HF's model, whose states decay slowly."""
    hf = random_model(family, OPTIONS[family][0])
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(4)
    return hf


@pytest.mark.parametrize(
    ("family", "tp"),
    [
        pytest.param(family, tp, marks=[] if (family, tp) == ("mamba2", 1) else pytest.mark.slow)
        for family in RECURRENT
        for tp in (1, 2)
    ],
)
def test_sequences_of_different_ages_give_their_own_logits(family: str, tp: int) -> None:
    """In chunks, with padding, and with rows without tokens, whose slots stay as they are; then copied."""
    hf = original(family)
    of = runtime_of(hf, tp)
    last = prefilled(of, SEQUENCES)
    for n, tokens in enumerate(SEQUENCES):
        check(last[n], tiny.logits(hf, np.asarray([tokens]))[0, -1])
    of.copy(np.asarray([PLACES[0]], np.int32), np.asarray([1], np.int32))
    assert same(slot(of, 1), slot(of, PLACES[0]))
    before = slot(of, PLACES[1])
    output = of.run(step_input(DECODE, [[], [9], [5], [6]], [0, len(SEQUENCES[0]), len(SEQUENCES[0]), 7]))
    assert same(slot(of, PLACES[1]), before)
    for place, tokens in ((1, [*SEQUENCES[0], 9]), (2, [*SEQUENCES[0], 5]), (3, [*SEQUENCES[2], 6])):
        check(np.asarray(output.logits)[place], tiny.logits(hf, np.asarray([tokens]))[0, -1])


@families("mamba2")
def test_a_prompt_may_be_cut_at_every_token(family: str) -> None:
    """In one slot, which each prompt finds as the one before left it."""
    hf, key = original(family), ProgramKey("prefill", 1, 16, 64)
    of, tokens = runtime_of(hf, 1), SEQUENCES[0]
    expected = tiny.logits(hf, np.asarray([tokens]))[0, -1]
    for cut in range(1, len(tokens)):
        of.run(step_input(key, [tokens[:cut]], [0], [2]))
        output = of.run(step_input(key, [tokens[cut:]], [cut], [2]))
        check(np.asarray(output.logits)[0], expected)


@pytest.mark.slow
@families("lfm2")
@pytest.mark.parametrize("backend", ["xla", "host"])
def test_slots_prefixes_and_answers_share_no_state(family: str, backend: str, tmp_path: Path) -> None:
    hf = original(family)
    hf.save_pretrained(tmp_path)
    model = NeuronAutoModelForCausalLM.from_pretrained(
        tmp_path, batch_size=2, n_positions=64, context_length_estimate=8, backend=backend
    )
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 101, 11).tolist()
    prompts = [rng.integers(0, 101, length).tolist() for length in (20, 3, 9, 1)] + [[*prefix, n] for n in range(3)]
    greedy = SamplingParams(max_tokens=12, eos_token_id=-1)
    expected = [tiny.greedy(hf, np.array([prompt]), len(prompt) + 12)[0, len(prompt) :].tolist() for prompt in prompts]
    assert [list(answer.ids) for answer in model.generate(prompts, greedy)] == expected  # more prompts than slots
    model.keep_prefix([prefix])
    assert [list(answer.ids) for answer in model.generate(prompts[::-1], greedy)] == expected[::-1]
    two = SamplingParams(max_tokens=12, eos_token_id=-1, n=2)
    found = model.generate(prompts[:1] * 2, two)
    assert [list(answer.ids) for generation in found for answer in generation.answers] == expected[:1] * 4


@pytest.mark.few(2)
@pytest.mark.parametrize("family", RECURRENT)
def test_bytes_of_the_state_are_those_of_the_program(family: str) -> None:
    raw = AutoConfig.for_model(family, **OPTIONS[family][0]).to_dict()
    decoder = Decoder.from_config(raw, 4)
    (program,) = lower_model(decoder, [ProgramKey("prefill", 1, 2 * CHUNK, 2 * CHUNK)], 3, 2 * CHUNK, jnp.bfloat16)
    tables = [t for t in program.inputs if t.kind == "state" and t.name != "state.token"]
    bytes_held = sum(int(np.prod(t.shape)) * jnp.dtype(t.dtype).itemsize for t in tables)
    assert Outline.of(raw).cache_bytes(4, 3, 2 * CHUNK, 2) == bytes_held
    assert {t.dtype for t in tables} == ({"bfloat16"} if "lfm2" in family else {"bfloat16", "float32"})
    for target in ("inf2", "trn1", "trn2"):  # a loop over chunks among what is checked
        assert program.verify(target) == []


@pytest.mark.parametrize("family", RECURRENT)
def test_a_plan_counts_the_all_reduces_of_sublayers(family: str) -> None:
    raw = AutoConfig.for_model(family, **OPTIONS[family][0]).to_dict()
    outline = Outline.of(raw)
    count = outline.all_reduces * outline.decoder.config.layers
    assert round(count, 6) == all_reduces(family, raw, outline.decoder.config.layers, tp=1)  # where no norm needs one


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT)
def test_four_thousand_positions_do_not_drift(family: str) -> None:
    hf = original(family)
    tokens = np.random.default_rng(0).integers(0, 101, 4096).tolist()
    of = runtime_of(hf, 1)
    key, at = ProgramKey("prefill", 1, 256, 4096), 0
    while at < 4000:
        of.run(step_input(key, [tokens[at : min(at + 250, 4000)]], [at], [0]))
        at += 250
    for at in range(4000, 4096):
        output = of.run(step_input(ProgramKey("decode", 1, 1, 4096), [[tokens[at]]], [at]))
    expected = tiny.logits(hf, np.asarray([tokens]))[0, -1]
    np.testing.assert_allclose(
        np.asarray(output.logits)[0, : len(expected)], expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )
