"""What neuronx-cc is given for each family: its collectives, its caches, and that the compiler would take it."""

import math
from collections import Counter
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import tiny
from families import FIRST_RELEASE, NORMS_OVER_HEADS, OPTIONS, all_reduces, is_parallel, numbered
from jax import numpy as jnp
from transformers import AutoConfig

from jx_neuron.lowering import Program
from jx_neuron.lowering.hlo import graph as hlo
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.models.known import KNOWN
from jx_neuron.step.program_key import ProgramKey

LAYERS = ("n_layer", "num_hidden_layers")
SLOTS, POSITIONS, TP = 3, 96, 4
DECODE, SAMPLED = ProgramKey("decode", 2, 1, 64), ProgramKey("decode", 2, 1, 64, 16)
PREFILL = ProgramKey("prefill", 2, 32, 32, 16)


@cache
def programs(name: str, layers: int = 2, vocab: int = 640, slots: int = SLOTS) -> dict[ProgramKey, Program]:
    """A tiny model of the family at tp 4, its state table larger than what programs read of it."""
    raw = tiny.CONFIGS[name]().to_dict() | {"vocab_size": vocab}
    raw |= {key: layers for key in LAYERS if key in raw}
    keys, decoder = [DECODE, SAMPLED, PREFILL], Decoder.from_config(raw, TP)
    return dict(zip(keys, lower_model(decoder, keys, slots, POSITIONS, jnp.bfloat16), strict=True))


def collectives(program: Program) -> Counter[str]:
    return Counter(c.opcode for c in program.collectives())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_collectives_of_a_step(name: str) -> None:
    per_layer = 1 if is_parallel(name, {}) else 2
    one, two = programs(name, 1), programs(name, 2)
    for key in (DECODE, SAMPLED, PREFILL):
        assert collectives(two[key]) - collectives(one[key]) == Counter({"all-reduce": per_layer})
    # the embedding's rows, then each shard's best candidates and where they stand
    fixed = Counter({"all-reduce": 1, "all-gather": 2})
    assert collectives(one[DECODE]) == fixed + Counter({"all-reduce": per_layer})
    assert collectives(one[SAMPLED]) == fixed + Counter({"all-reduce": per_layer})
    for program in two.values():
        assert {c.replica_groups for c in program.collectives()} == {(tuple(range(TP)),)}


EVERY = [(name, options) for name, several in OPTIONS.items() for options in several]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), EVERY, ids=numbered(EVERY))
def test_collectives_of_every_family(name: str, options: dict[str, Any]) -> None:
    """An all-reduce for each sum over split axes: of each table of embeddings, of attention and MLP, together where the
    residual adds both, of experts where a norm is between them and the MLP, and of squares of queries and keys where a
    norm is over all heads. Two gathers are of candidates, and one of the numbers of key heads for such a norm."""
    raw = AutoConfig.for_model(name, **deepcopy(options)).to_dict()
    decoder, over_heads = Decoder.from_config(raw, TP), name in NORMS_OVER_HEADS
    sums = 1 + bool(raw.get("hidden_size_per_layer_input")) + all_reduces(name, raw, decoder.config.layers, TP)
    keys = [ProgramKey("decode", 2, 1, 64, 16), ProgramKey("prefill", 2, 32, 32, 16)]
    for program in lower_model(decoder, keys, SLOTS, POSITIONS, jnp.bfloat16):
        expected = Counter({"all-reduce": sums, "all-gather": 2 + over_heads})
        assert collectives(program) == expected, program.name
        assert {c.replica_groups for c in program.collectives()} == {(tuple(range(TP)),)}
        for target in ("inf2", "trn1", "trn2"):
            assert program.verify(target) == [], f"{program.name} on {target}"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_what_the_head_gathers_does_not_depend_on_the_vocabulary(name: str) -> None:
    for key, gathered in ((DECODE, 2 * TP * (4 + 4)), (SAMPLED, 2 * TP * 16 * (4 + 4))):
        for vocab in (640, 1280):
            found = programs(name, vocab=vocab)[key].collectives()
            assert sum(c.bytes for c in found if c.opcode == "all-gather") == gathered


@pytest.mark.few(4)
@pytest.mark.parametrize("key", [DECODE, SAMPLED, PREFILL], ids=lambda key: key.name)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_state_is_written_in_place(name: str, key: ProgramKey) -> None:
    program = programs(name)[key]
    module = hlo.parse(program.hlo_module)
    caches = [n for n, spec in enumerate(program.inputs) if spec.kind == "state"]
    outputs = {n: spec.alias for n, spec in enumerate(program.outputs) if spec.alias is not None}
    assert len(caches) == 4 + 1  # keys and values of two layers, and the last tokens
    assert sorted(outputs.values()) == caches
    assert module.aliases == {source: output for output, source in outputs.items()}
    whole = module.entry.parameters[caches[0]].shape
    assert SLOTS in whole.dims
    same = Counter(i.opcode for i in module.entry.instructions if i.shape == whole)
    assert same in (Counter(parameter=4, scatter=4), Counter({"parameter": 4, "dynamic-update-slice": 8}))
    for source, output in module.aliases.items():
        if program.inputs[source].name == "state.token":
            continue
        written = module.entry.root.operands[output]
        assert written.opcode in ("scatter", "dynamic-update-slice")
        while written.opcode in ("scatter", "dynamic-update-slice"):
            written = written.operands[0]
        assert written is module.entry.parameters[source]


@pytest.mark.few(3)
@pytest.mark.parametrize("slots", [DECODE.rows, SLOTS])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_decode_step_moves_no_more_than_its_weights_and_its_bucket(name: str, slots: int) -> None:
    program = programs(name, slots=slots)[DECODE]
    specs = {kind: [s for s in program.inputs if s.kind == kind] for kind in ("param", "state")}
    tables = [s for s in specs["param"] if s.name in ("wpe.embedding", "embed_positions.embedding")]
    weights = sum(2 * math.prod(s.shape) for s in specs["param"] if s not in tables)
    *states, _ = specs["state"]
    bucket = sum(2 * math.prod(s.shape[1:]) * DECODE.rows * DECODE.positions // POSITIONS for s in states)
    cost = program.cost()
    assert cost.bytes_read <= 1.05 * (weights + bucket)
    entries = sum(2 * math.prod(s.shape[1:]) * DECODE.rows // POSITIONS for s in states)
    logits = sum(4 * math.prod(s.shape) for s in program.outputs if s.kind == "output")
    assert cost.bytes_written == entries + logits + 4 * DECODE.rows  # and the last tokens


def small(name: str) -> tuple[dict[str, Any], int]:
    """A checkpoint of the first release with two of its layers, and a degree that divides its heads."""
    raw = dict(KNOWN[name])
    raw |= {key: 2 for key in LAYERS if key in raw}
    heads = raw.get("n_head") or raw["num_attention_heads"]
    return raw, next(tp for tp in (8, 4, 2, 1) if heads % tp == 0)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FIRST_RELEASE)
def test_neuron_takes_the_checkpoints_of_the_first_release(name: str) -> None:
    raw, tp = small(name)
    decoder = Decoder.from_config(raw, tp)
    s = decoder.config.max_positions
    keys = [ProgramKey("decode", 1, 1, s, 64), ProgramKey("prefill", 1, s // 2, s, 64)]
    for program in lower_model(decoder, keys, 2, s, jnp.float16):
        for target in ("inf2", "trn1", "trn2"):
            assert program.verify(target) == [], f"{program.name} on {target}"
