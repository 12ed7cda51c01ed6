"""Config fields: HF's defaults, HF's names, real checkpoints' config.json files, and refusals."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import pytest
import transformers
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jx_neuron.checkpoint.hf_config import INERT, ONLY, HFConfig
from jx_neuron.errors import ConfigError, JxNeuronError
from jx_neuron.models import Decoder, family, model_types
from jx_neuron.nn.layers import ACT

HF = {model_type: CONFIG_MAPPING[model_type] for model_type in model_types()}
# what HF's defaults cannot be run without: experts of a token, heads that fill the width, and types of layers
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv"] * 32},
}


def undeclared(hf: type[transformers.PretrainedConfig]) -> dict[str, Any]:
    """Fields that HF's classes read without declaring them, with what they are where config.json has none."""
    part = (getattr(hf(), "rope_parameters", None) or {}).get("partial_rotary_factor")
    theta = getattr(hf, "default_theta", None)
    nulls = dict.fromkeys("attention_layers head_dim original_max_position_embeddings rope_scaling rotary_dim".split())
    names = {"partial_rotary_factor": part, "rotary_pct": part, "rope_theta": theta, "rotary_emb_base": theta}
    names |= {"full_attention_interval": 4, "hidden_act": "silu"}  # Qwen3.5's, and what LFM2 has without a field
    if isinstance(theta, dict):  # of two layer types
        names |= {"rope_theta": theta["global"], "rope_local_base_freq": theta["local"]}
    for entry in (hf().to_dict().get("per_layer_config") or {}).values():
        nulls |= dict.fromkeys(["num_global_key_value_heads", "per_layer_config"])
        names |= {"global_head_dim": entry["head_dim"]}
    return nulls | names | {"sliding_window_pattern": getattr(hf(), "_sliding_window_pattern", None)}


# config.json as the Hub has them
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
OPT = {
    "_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
    "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
    "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
    "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
    "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}  # fmt: skip
GPTJ = {
    "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
    "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "gradient_checkpointing": False,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 4096, "n_head": 16,
    "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
    "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
    "tie_word_embeddings": False, "tokenizer_class": "GPT2Tokenizer", "transformers_version": "4.18.0.dev0",
    "use_cache": True, "vocab_size": 50400,
}  # fmt: skip
LLAMA = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_31 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009], "intermediate_size": 14336, "max_position_embeddings": 131072,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "vocab_size": 128256,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {},
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI = PHI3 | {
    "eos_token_id": 199999, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
    "vocab_size": 128256,
}  # fmt: skip
GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.49.0", "use_cache": True,
    "vocab_size": 49159,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
REAL = {
    "gpt2": (GPT2, 124_439_808),
    "gpt2-xl": (
        GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True, "n_special": 0}
        | {"predict_special_tokens": True},
        1_557_611_200,
    ),
    "distilgpt2": (
        GPT2 | {"n_layer": 6, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        81_912_576,
    ),
    "opt-125m": (OPT, 125_239_296),
    "opt-350m": (
        OPT | {"do_layer_norm_before": False, "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096}
        | {"num_attention_heads": 16, "word_embed_proj_dim": 512},
        331_196_416,
    ),
    "opt-30b": (
        OPT | {"hidden_size": 7168, "num_hidden_layers": 48, "ffn_dim": 28672, "num_attention_heads": 56}
        | {"word_embed_proj_dim": 7168},
        29_974_540_288,
    ),
    "gpt-j-6B": (GPTJ, 6_050_882_784),
    "Llama-2-7b": (LLAMA, 6_738_415_616),
    "Llama-3.1-8B": (LLAMA_31, 8_030_261_248),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Qwen2.5-0.5B": (QWEN2, 494_032_768),
    "Qwen3-0.6B": (QWEN3, 596_049_920),
    "Mistral-7B": (MISTRAL, 7_241_732_096),
    "Phi-3-mini": (PHI3, 3_821_079_552),
    "Phi-4-mini": (PHI4_MINI, 3_836_021_760),
    "SmolLM3-3B": (SMOLLM3, 3_075_098_624),
    "granite-3.3-2b": (GRANITE, 2_533_539_840),
}  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.filterwarnings("error::UserWarning")  # no word of a field that public checkpoints have
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name: str) -> None:
    """Known parameter counts, so that no field is read as another."""
    raw, parameters = REAL[name]
    decoder = Decoder.from_config(raw)
    assert sum(p.size for p in decoder.abstract_params("float16").values()) == parameters


@pytest.mark.parametrize("model_type", sorted(HF))
def test_defaults_are_hfs(model_type: str) -> None:
    hf = HF[model_type]
    theirs = undeclared(hf) | {f.name: f.default for f in dataclasses.fields(hf)}
    ours = {f.metadata.get("hf", f.name): f.default for f in dataclasses.fields(family(model_type).Config)}
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("model_type", sorted(HF))
def test_every_field_of_hf_is_read_inert_or_refused(model_type: str) -> None:
    config, hf = family(model_type).Config, HF[model_type]
    read = {f.metadata.get("hf", f.name) for f in dataclasses.fields(config)}
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    known = read | INERT | set(ONLY) | config.INERT | set(config.ONLY) | set(config.ALIASES)
    assert {f.name for f in dataclasses.fields(hf)} | set(hf().to_dict()) | generation <= known
    assert not read & (INERT | config.INERT)


@pytest.mark.parametrize("model_type", sorted(HF))
def test_aliases_are_hfs(model_type: str) -> None:
    hf, config = HF[model_type], family(model_type).Config
    declared = {f.name for f in dataclasses.fields(hf)}
    names = {(other, name) if name in declared else (name, other) for name, other in hf.attribute_map.items()}
    assert {pair for pair in names if not config.INERT.issuperset(pair)} <= config.ALIASES.items()
    assert config.COMPLETE


@pytest.mark.few(15)
@pytest.mark.filterwarnings("error::UserWarning")  # no word of a field that HF declares
@pytest.mark.parametrize("model_type", sorted(HF))
def test_what_hf_saves_is_read(model_type: str) -> None:
    fields = NEEDED.get(model_type, {})
    hf = HF[model_type](**fields)
    for raw in (hf.to_diff_dict(), hf.to_dict()):
        assert Decoder.from_config(raw).config.sizes == family(model_type).Config(**fields).sizes


def test_every_activation_is_here() -> None:
    assert set(ACT) == set(ACT2FN) - {"prelu", "xielu"}


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gpt2", {"activation_function": "prelu"}, "activation_function='prelu' is not supported.*gelu_new"),
        ("opt", {"activation_function": "xielu"}, "'xielu' is not supported"),
        ("llama", {"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported"),
        ("gpt2", {"n_head": 5}, "n_embd=768 is not divisible by n_head=5"),
        ("gpt2", {"n_head": 0}, "n_head=0 should be a number from 1 to 2147483647"),
        ("gpt2", {"n_layer": "12"}, "n_layer='12' is of the wrong type; it should be int"),
        ("gpt2", {"n_layer": None}, "n_layer=None is of the wrong type"),
        ("gpt2", {"n_layer": True}, "n_layer=True is of the wrong type"),
        ("gpt2", {"scale_attn_weights": 1}, "scale_attn_weights=1 is of the wrong type; it should be bool"),
        ("gpt2", {"n_inner": 1.5}, "it should be int or null"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported, only False"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"num_hidden_layers": 3, "n_layer": 2}, "num_hidden_layers=3 and n_layer=2 are one field"),
        ("gpt2", {"n_layer": 501}, "501 layers are too many; at most 500"),
        ("opt", {"num_attention_heads": 7}, "hidden_size=768 is not divisible"),
        ("opt", {"per_layer_config": {"0": {}}}, "per_layer_config=.* is not supported"),
        ("gptj", {"rotary_dim": 0}, "rotary_dim=0 should be a number from 1 to"),
        ("gptj", {"rotary_dim": 63}, "rotary_dim=63 is not supported.*even number from 2 to the head size 256"),
        ("gptj", {"rotary_dim": 258}, "rotary_dim=258 is not supported"),
        ("gptj", {"n_embd": 48, "n_head": 16, "rotary_dim": None}, "rotary_dim=None is not supported.*size 3"),
        ("llama", {"num_key_value_heads": 5}, "num_attention_heads=32 is not divisible by num_key_value_heads=5"),
        ("llama", {"num_attention_heads": 3}, "hidden_size=4096 is not divisible by num_attention_heads=3"),
        ("llama", {"head_dim": 7}, "the head size 7 is odd.*set an even head_dim"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 should be a number from 1.1754944e-38 to 3.4028234e[+]38"),
        ("llama", {"rms_norm_eps": 10**5000}, "rms_norm_eps=an integer of thousands of digits should be a number"),
        ("llama", {"vocab_size": 2**31}, "vocab_size=2147483648 should be a number from 1 to 2147483647"),
        ("llama", {"hidden_act": "x" * 10**6}, r"hidden_act='x+\.\.\.x+' is not supported"),
        (
            "llama",
            {"layer_types": ["full_attention", "mamba"]},
            "layer_types=.*'mamba'.* only None or 'full_attention'",
        ),
        ("llama", {"rope_scaling": {"type": "axial"}}, "rope_type 'axial' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "needs factor"),
        ("llama", {"rope_scaling": [1]}, "it should be dict or null"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ",
        ),
        ("lfm2_moe", {}, "layer_types is null; it should have conv or full_attention for each layer"),
        ("granitemoehybrid", {"num_experts_per_tok": 0}, "num_experts_per_tok=0 is legal only where num_local_experts"),
        ("granitemoehybrid", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=8"),
        ("qwen3_next", {"linear_num_value_heads": 24}, "linear_num_value_heads=24 is not divisible by linear_num_key"),
        ("qwen3_5_moe_text", {"num_experts": 0}, "num_experts=0 should be a number from 1"),
        ("mamba", {}, "model_type 'mamba' is not supported; supported are .*gptj, .*llama, .*opt"),
        (None, {}, "the config has no model_type"),
    ],
)
def test_refusals(model_type: str | None, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Decoder.from_config({"model_type": model_type, **fields})
    assert isinstance(caught.value, JxNeuronError)


@pytest.mark.parametrize("kv_heads", [None, 4, 32])
def test_key_value_heads(kv_heads: int | None) -> None:
    found = Decoder.from_config({"model_type": "llama", "num_key_value_heads": kv_heads})
    assert found.config.sizes["k"] == (kv_heads or 32)


def test_a_config_of_ones_own() -> None:
    """Renamed fields, zero where it is the default, required fields, values known in part."""

    @dataclass(frozen=True)
    class Config(HFConfig):
        width: int
        skipped: int = 0
        hidden: float = dataclasses.field(default=1.0, metadata={"hf": "_hidden"})
        shift: float = dataclasses.field(default=0.5, metadata={"least": -1.0})
        window: Optional[int] = None  # noqa: UP045
        MODEL_TYPE: ClassVar[str] = "own"
        INERT: ClassVar[frozenset[str]] = frozenset({"colour", "sliding_window"})
        ONLY: ClassVar = {"shape": ("round", "square")}
        layers = 1

    raw = {"width": 3, "skipped": 0, "_hidden": 2, "colour": "red", "shape": "round", "shift": -1, "sliding_window": 4}
    assert Config.from_hf(raw) == Config(width=3, hidden=2, shift=-1)
    assert Config.from_hf({"width": 3, "window": None}) == Config(width=3)
    assert type(Config.from_hf({"width": 3, "shift": 2**31}).shift) is float  # an int of this size is none of JAX's
    for raw, message in (
        ({"width": 1, "shift": -1.5}, "shift=-1.5 should be a number from -1 to"),
        ({"width": 1, "window": 1.0}, "window=1.0 is of the wrong type; it should be int or null"),
        ({}, "own: .*'width'"),
        ({"width": 0}, "width=0 should be a number from 1 to"),
        ({"width": 1, "skipped": -1}, "skipped=-1 should be a number from 0 to"),
        ({"width": 1, "hidden": 2}, "'hidden' is not known here.*_hidden, shift, skipped, width, window"),
        ({"width": 1, "shape": "oval"}, "only 'round' or 'square'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Config.from_hf(raw)


@pytest.mark.parametrize("model_type", ["gpt_neox", "helium", "stablelm"])
def test_heads_that_are_not_as_wide_as_the_model_are_refused(model_type: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = family(model_type).Config
    if model_type == "gpt_neox":
        del sizes["num_key_value_heads"]
    assert config.from_hf(sizes | {"head_dim": 16}).sizes["h"] == 16
    with pytest.raises(ConfigError, match=f"{model_type}: num_attention_heads=4 of head_dim=20 make up 80"):
        config.from_hf(sizes | {"head_dim": 20})
