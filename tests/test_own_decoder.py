"""A decoder of one's own, from examples/persimmon.py: parity, lowering, and a module with no checkpoint."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from test_cli import run

from jx_neuron import NeuronAutoModelForCausalLM, model_types, register
from jx_neuron.errors import ConfigError, InputError
from jx_neuron.integrations.parity import parity
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder, gpt2
from jx_neuron.planning.outline import Outline
from jx_neuron.step.program_key import ProgramKey

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import persimmon


def original(normed: bool = True, tied: bool = False) -> transformers.PersimmonForCausalLM:
    torch.manual_seed(0)
    config = transformers.PersimmonConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=80,
        max_position_embeddings=64,
        qk_layernorm=normed,
        tie_word_embeddings=tied,
    )
    model = transformers.PersimmonForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


@pytest.mark.few(1)
@pytest.mark.parametrize(("normed", "tp_degree"), [(True, 1), (False, 1), (True, 4)])
def test_it_is_hf_s(tmp_path: Path, normed: bool, tp_degree: int) -> None:
    original(normed).save_pretrained(tmp_path)
    assert parity(tmp_path, tp_degree=tp_degree).worst < 1e-5


@pytest.mark.few(1)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_memory_is_hf_s_and_so_is_a_tied_head(tmp_path: Path, tied: bool) -> None:
    hf = original(tied=tied)
    assert parity(hf, steps=2).worst < 1e-5
    hf.save_pretrained(tmp_path)
    assert parity(tmp_path, steps=2).worst < 1e-5


def test_it_is_short() -> None:
    assert len(Path(persimmon.__file__).read_text().splitlines()) < 120


def test_the_fields_of_checkpoints_before_transformers_5_mean_the_same() -> None:
    told = persimmon.Config.from_hf({"partial_rotary_factor": 0.25, "rope_theta": 5000.0}).rope
    now = {"rope_type": "default", "partial_rotary_factor": 0.25, "rope_theta": 5000}
    rope = persimmon.Config.from_hf({"rope_parameters": now}).rope
    assert (told.r, told.theta) == (rope.r, rope.theta) == (16, 5000)
    with pytest.raises(ConfigError, match="hidden_act='prelu'"):
        persimmon.Config.from_hf({"hidden_act": "prelu"})


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "checkpoint")
    how = ("--tp", 4, "--n-positions", 16, "--hlo-only", "--no-weights", "-o", tmp_path / "out")
    done = run("compile", tmp_path / "checkpoint" / "config.json", *how)
    assert done.returncode == 0, done
    assert run("check", tmp_path / "out", "--target", "trn2").stdout.count("passes on trn2") == 3


def test_it_is_loaded_lowered_saved_and_sampled(tmp_path: Path) -> None:
    assert "persimmon" in model_types()
    hf = original()
    hf.save_pretrained(tmp_path / "checkpoint")
    ids = np.random.default_rng(0).integers(1, 97, (1, 9))
    expected = hf.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(1, 9),
        max_length=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    options = dict(n_positions=40, tp_degree=4)
    lowered = NeuronAutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", backend="host", **options)
    np.testing.assert_array_equal(lowered.sample(ids, 40, top_k=1, eos_token_override=-1), expected)
    lowered.save(tmp_path / "saved", sharded_weights=True)
    again = NeuronAutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.sample(ids, 40, top_k=1, eos_token_override=-1), expected)


def test_all_reduces_of_a_decoder_of_one_s_own_are_those_of_the_lowered_program() -> None:
    fields = dict(hidden_size=48, intermediate_size=80, num_attention_heads=6, num_hidden_layers=3, vocab_size=97)
    raw = {"model_type": "persimmon", **fields}
    (program,) = lower_model(Decoder.from_config(raw, 2), [ProgramKey("decode", 1, 1, 16)], 1, 16, np.float32)
    opcodes = [collective.opcode for collective in program.collectives()]
    assert Outline.of(raw).all_reduces == 2
    assert opcodes.count("all-reduce") == 3 * 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("table", [(), gpt2.WEIGHTS], ids=["without table", "with table"])
def test_a_module_in_hand_is_sampled_lowered_and_saved(tmp_path: Path, table) -> None:
    config = gpt2.Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    module = gpt2.Model(config, nnx.Rngs(3))
    ids = np.random.default_rng(0).integers(0, 64, (2, 5))
    xla = NeuronAutoModelForCausalLM.from_module(module, config, batch_size=2)
    expected = xla.sample(ids, 30, top_k=8, seed=1)
    tp = 2 if table else 1
    host = NeuronAutoModelForCausalLM.from_module(
        module, config, weights=table, batch_size=2, tp_degree=tp, backend="host"
    )
    np.testing.assert_array_equal(host.sample(ids, 30, top_k=8, seed=1), expected)
    host.save(tmp_path / "saved", sharded_weights=True)
    again = NeuronAutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.sample(ids, 30, top_k=8, seed=1), expected)
    with pytest.raises(InputError, match="no tokenizer"):
        xla.tokenizer  # noqa: B018


def test_a_module_without_a_table_cannot_be_split() -> None:
    config = gpt2.Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(ConfigError, match="tp_degree=1"):
        NeuronAutoModelForCausalLM.from_module(gpt2.Model(config, nnx.Rngs(3)), config, tp_degree=2)


def test_what_lacks_a_part_is_not_registered() -> None:
    with pytest.raises(ConfigError, match="WEIGHTS, IGNORE"):
        register("half", type("Half", (), {"Config": gpt2.Config, "Model": gpt2.Model}))
    assert "half" not in model_types()
