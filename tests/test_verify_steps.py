"""Steps that verify drafts: what their programs move, and how recurrent layers go back to before a draft."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from families import OPTIONS
from jax import numpy as jnp
from steps import step_input
from test_recurrent import RECURRENT, families, original
from test_speculation import KINDS, Knows, prompts
from test_state import check, same, slot
from test_state import runtime as runtime_of
from transformers import AutoConfig

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.errors import ConfigError
from jx_neuron.lowering import Program
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.step.program_key import ProgramKey

VERIFIED = "cohere2 deepseek_v3 gemma3_text gpt2 gpt_oss llama opt qwen3_moe".split()
TARGETS = ("inf2", "trn1", "trn2", "trn3")
ROWS, TOKENS, POSITIONS = 2, 4, 256


def moved(program: Program) -> int:
    """Bytes that a run reads and writes, without the logits and tokens that it gives."""
    given = sum(jnp.dtype(t.dtype).itemsize * math.prod(t.shape) for t in program.outputs if t.kind == "output")
    cost = program.cost()
    return cost.bytes_read + cost.bytes_written - given


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("llama", "mamba2") else pytest.mark.slow)
        for name in (*VERIFIED, *RECURRENT)
    ],
)
@pytest.mark.parametrize("tp", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_verify_step_moves_little_more_than_a_decode_step(family: str, tp: int) -> None:
    raw = AutoConfig.for_model(family, **deepcopy(OPTIONS[family][0])).to_dict()
    keys = [ProgramKey("decode", ROWS, 1, POSITIONS, 16), ProgramKey("verify", ROWS, TOKENS, POSITIONS, 16)]
    decoder = Decoder.from_config(raw, tp).with_drafts()
    decode, verify = lower_model(decoder, keys, ROWS, POSITIONS, jnp.bfloat16)
    state = [t for t in verify.inputs if t.kind == "state" and t.name != "state.token"]
    row = sum(jnp.dtype(t.dtype).itemsize * math.prod(t.shape[1:]) for t in state)
    assert moved(decode) < moved(verify) <= 1.05 * moved(decode) + TOKENS * row
    for target in TARGETS:
        assert verify.verify(target) == []


@families("mamba2")
def test_a_step_begins_again_where_a_draft_was_refused(family: str) -> None:
    hf, tokens = original(family), np.random.default_rng(0).integers(0, tiny.VOCAB, 13).tolist()
    of, expected = runtime_of(hf, 1), tiny.logits(hf, np.asarray([tokens]))[0]
    prefill, verify = ProgramKey("prefill", 2, 8, 16), ProgramKey("verify", 2, 4, 16)

    def run(rows: list[list[int]], starts: list[int]) -> np.ndarray:
        return np.asarray(of.run(step_input(verify, rows, starts)).logits)

    of.run(step_input(prefill, [tokens[:5], tokens[:6]], [0, 0], [0, 1]))
    check(run([tokens[5:9], []], [5, 0])[0], expected[5:9])  # before the table keeps anything
    idle = slot(of, 1)
    other = [(token + 1) % tiny.VOCAB for token in tokens[10:12]]
    check(run([[tokens[9], *other], []], [9, 0])[0, 0], expected[9])
    for _ in range(2):  # once more: the state before the draft stays
        check(run([tokens[9:11], []], [-1 - 9, 0])[0, :2], expected[9:11])
    assert same(slot(of, 1), idle)
    check(run([tokens[11:], tokens[6:10]], [11, 6])[0, :2], expected[11:])
    check(run([[], tokens[6:10]], [0, -1 - 6])[1], expected[6:10])


def made(folder: Path, backend: str) -> NeuronAutoModelForCausalLM:
    config = NeuronConfig(speculation_length=[4, 8]) if backend == "host" else None
    shapes: dict[str, Any] = dict(n_positions=[64], context_length_estimate=[16], batch_size=3, neuron_config=config)
    return NeuronAutoModelForCausalLM.from_pretrained(folder, backend=backend, **shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"), [*((family, "host") for family in RECURRENT), ("mamba2", "xla"), ("qwen3_next", "xla")]
)
def test_recurrent_models_verify_drafts(family: str, backend: str, tmp_path: Path) -> None:
    original(family).save_pretrained(tmp_path)
    model = made(tmp_path, backend)
    for sampling in KINDS.values():
        several = [replace(sampling, seed=n, eos_token_id=-1) for n in range(8)]
        plain = model.generate(prompts(8), several)
        answers = {generation.prompt_ids: generation.ids for generation in plain}
        for draft in ("ngram", Knows(answers, right=0.5), Knows(answers, right=0.9), Knows(answers, right=1)):
            drafted = model.generate(prompts(8), several, draft=draft)
            assert [g.ids for g in drafted] == [g.ids for g in plain]
        steps = sum(generation.answers[0].drafts.steps for generation in drafted)
        assert steps < sum(len(generation.ids) for generation in drafted) / 2  # all are right at last


@pytest.mark.slow
def test_a_recurrent_model_drafts_for_none(tmp_path: Path) -> None:
    original("lfm2").save_pretrained(tmp_path)
    model, draft = made(tmp_path, "xla"), made(tmp_path, "xla")
    with pytest.raises(ConfigError, match="lfm2"):
        model.generate([[1]], draft=draft)
