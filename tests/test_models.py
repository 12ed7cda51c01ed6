"""Each family against HF transformers: every option of its config, padding, chunks, tensor parallelism."""

import math
import statistics
from collections import Counter
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import InputError
from jx_neuron.integrations import parity as testing
from jx_neuron.integrations.parity import parity
from jx_neuron.lowering import lower
from jx_neuron.models import Decoder
from jx_neuron.models.registry import FAMILIES
from jx_neuron.nn.layers import ACT
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step import step

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = SPECIAL | {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 24}
GPTJ = GPT2 | {"rotary_dim": 8}
OPT = SPECIAL | {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 90,
    "vocab_size": 101,
    "max_position_embeddings": 24,
}
LLAMA = SPECIAL | {
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]}


def random_model(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """Every parameter random: matrices keep the scale of what they multiply, norms are near 1, biases far from 0."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 1 / math.sqrt(p.shape[-1]))
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
            else:
                p.normal_(1, 0.3)
    return model


OPTIONS = {
    "gpt2-untied-n_inner": GPT2 | {"n_inner": 90, "activation_function": "quick_gelu", "tie_word_embeddings": False},
    "gpt2-unscaled": GPT2 | {"scale_attn_weights": False, "layer_norm_epsilon": 0.1},
    "gpt2-inverse-layer-6-heads": GPT2
    | {"n_head": 6, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "opt-post-norm-projected": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 30},
    "opt-no-final-norm-projected-untied": OPT
    | {"_remove_final_layer_norm": True, "word_embed_proj_dim": 30, "tie_word_embeddings": False},
    "opt-no-bias-no-affine-gelu": OPT
    | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "gptj-whole-head": GPTJ | {"rotary_dim": 12, "layer_norm_epsilon": 0.1},
    "gptj-tied-n_inner": GPTJ | {"tie_word_embeddings": True, "n_inner": 90, "activation_function": "silu"},
    "llama-mha-tied": LLAMA | {"num_key_value_heads": None, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
    "llama-head_dim-biases": LLAMA
    | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20, "attention_bias": True, "mlp_bias": True},
    "llama-mqa-gelu-theta": LLAMA
    | {"num_key_value_heads": 1, "hidden_act": "gelu", "rope_parameters": {"rope_theta": 500.0}},
}
PLAIN = {"gpt2": GPT2, "opt": OPT, "gptj": GPTJ, "llama": LLAMA}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 8},
    "longrope": {"rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": 10, **FACTORS},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def config(name: str, options: dict) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(name.split("-", 1)[0], **options)


@pytest.mark.few(3)
@pytest.mark.parametrize("tp_degree", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_agree_with_hf(name: str, tp_degree: int) -> None:
    found = parity(random_model(config(name, OPTIONS[name])), tp_degree=tp_degree)
    assert found.worst <= 1e-5
    assert len(found.decode) == 8


# lengths 12, 7 and 1 and 8 steps: row 0 starts beyond what dynamic and longrope were made for, row 1 gets there
@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ROPE)
def test_rope_scaling_agrees_with_hf(kind: str) -> None:
    hf = transformers.LlamaConfig(**LLAMA, max_position_embeddings=10, rope_parameters=dict(ROPE[kind]))
    assert parity(random_model(hf)).worst <= 1e-5


@pytest.mark.few(1)
@pytest.mark.parametrize("name", PLAIN)
def test_prompts_in_chunks_agree_with_hf(name: str) -> None:
    options = PLAIN[name]
    if name == "llama":
        options = options | {"max_position_embeddings": 10, "rope_parameters": dict(ROPE["longrope"])}
    assert parity(random_model(config(name, options)), chunk=4, lengths=(11, 6, 1), steps=2).worst <= 1e-5


@pytest.mark.parametrize("n_head", [1, 4])
def test_gptj_rotary_dim_null_is_the_whole_head(n_head: int) -> None:
    options = GPTJ | {"n_head": n_head, "rotary_dim": 48 // n_head}
    hf = random_model(transformers.GPTJConfig(**options))
    hf.config.__dict__["rotary_dim"] = None  # HF's own code takes null with one head only
    if n_head == 1:
        for block in hf.transformer.h:
            block.attn.rotary_dim = None
    assert parity(hf, steps=2).worst <= 1e-5


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.fc_out.bias", "transformer.h.0.ln_1.weight"])
def test_parity_sees_one_wrong_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(testing.ModelTensors):
        def read(self, asked: str) -> np.ndarray:
            return super().read(asked) * (1.01 if asked == name else 1)

    monkeypatch.setattr(testing, "ModelTensors", Wrong)
    found = parity(random_model(transformers.GPTJConfig(**GPTJ)), steps=1, lengths=(3,))
    assert found.prefill > 1e-4
    assert found.decode[0] > 1e-4


def test_parity_reads_a_folder(tmp_path) -> None:
    random_model(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    assert parity(tmp_path, steps=1, lengths=(3, 2)).worst <= 1e-5


def test_parity_refuses_more_than_the_model_has_positions_for() -> None:
    with pytest.raises(InputError, match="24 positions"):
        parity(random_model(transformers.GPT2Config(**GPT2)), lengths=(20,), steps=5)


@pytest.mark.parametrize("name", sorted(set(transformers.activations.ACT2FN) - {"prelu", "xielu"}))
def test_activation(name: str) -> None:
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    expected = transformers.activations.ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.asarray(ACT[name](jnp.asarray(x))), expected, rtol=2e-6, atol=1e-6)


def all_reduces(options: transformers.PretrainedConfig, layers: int) -> Counter:
    """Collectives of a decode step at tp 4, by kind, as neuronx-cc gets them."""
    raw = options.to_dict()
    raw |= {key: layers for key in ("n_layer", "num_hidden_layers") if key in raw}
    decoder = Decoder.from_config(raw, 4)
    state = decoder.abstract_state(2, 16, jnp.float32)
    program = lower(
        step(decoder, ProgramKey("decode", 2, 1, 16)),
        decoder.abstract_params(jnp.float32),
        state,
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1), (2,), (2,))),
        tp_degree=4,
        in_specs=({row.target: row.partition for row in decoder.rows}, state.partition(), P(), P(), P()),
        out_specs=(P(), P(), state.partition()),
        donate_argnums=(1,),
    )
    return Counter(c.opcode for c in program.collectives())


@pytest.mark.parametrize(("name", "per_layer"), [("gpt2", 2), ("opt", 2), ("gptj", 1), ("llama", 2)])
def test_all_reduces_per_layer(name: str, per_layer: int) -> None:
    one, three = (all_reduces(config(name, PLAIN[name]), layers) for layers in (1, 3))
    assert three - one == Counter({"all-reduce": 2 * per_layer})


def full_size(name: str) -> transformers.PretrainedConfig:
    match name:
        case "gpt2":
            return transformers.GPT2Config()
        case "opt-125m":
            return transformers.OPTConfig()
        case "opt-350m":
            return transformers.OPTConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, ffn_dim=4096,
                do_layer_norm_before=False, word_embed_proj_dim=512,
            )  # fmt: skip
        case "gptj":
            return transformers.GPTJConfig(n_layer=12, n_embd=1024, n_head=16, rotary_dim=32)
        case _:
            return transformers.LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
                tie_word_embeddings=True,
            )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt-125m", "opt-350m", "gptj", "llama"])
def test_full_size_agrees_with_hf(name: str) -> None:
    hf = random_model(full_size(name))
    for lengths in ((33,), (33, 20, 9, 2)):
        found = parity(hf, lengths=lengths, steps=32)
        print(f"{name}, batch {len(lengths)}: prefill {found.prefill:.1e}, decode {max(found.decode):.1e}")
        assert found.worst <= 1e-4


def test_a_decoder_is_one_short_file() -> None:
    modules = [import_module(entry) for entry in FAMILIES.values() if isinstance(entry, str)]
    lines = {str(module.__name__): len(Path(str(module.__file__)).read_text().splitlines()) for module in modules}
    assert len(lines) >= 40
    assert statistics.median(lines.values()) <= 90
    assert {name: count for name, count in lines.items() if count > 140} == {}
    assert lines["jx_neuron.models.llama"] <= 100
