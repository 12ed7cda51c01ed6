"""Fields that public config.json files have: honoured, ignored as HF ignores them, or refused for what HF does."""

import dataclasses
import importlib
import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_families import OPTIONS as FAMILIES
from test_families import random_model
from tiny import CONFIGS, prompts, saved

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.checkpoint.hf_config import INERT, ONLY
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.models import family
from jx_neuron.models.llama_like import LlamaLikeConfig
from jx_neuron.planning.outline import Outline

IDS = prompts(1, 5)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# fields that change the logits, and the line of HF that reads each
HONOURED: dict[str, dict[str, tuple[Any, str, str]]] = {
    "gpt2": {
        "hidden_size": (48, "configuration_utils", 'key = super().__getattribute__("attribute_map")[key]'),
        "n_inner": (192, "models.gpt2.modeling_gpt2", "inner_dim = config.n_inner if config.n_inner is not None"),
        "activation_function": ("relu", "models.gpt2.modeling_gpt2", "ACT2FN[config.activation_function]"),
        "layer_norm_epsilon": (0.1, "models.gpt2.modeling_gpt2", "eps=config.layer_norm_epsilon"),
        "scale_attn_weights": (False, "models.gpt2.modeling_gpt2", "config.scale_attn_weights"),
        "scale_attn_by_inverse_layer_idx": (
            True,
            "models.gpt2.modeling_gpt2",
            "config.scale_attn_by_inverse_layer_idx",
        ),
    },
    "gptj": {
        "rotary_dim": (4, "models.gptj.modeling_gptj", "self.rotary_dim = config.rotary_dim"),
        "num_attention_heads": (2, "models.gptj.configuration_gptj", '"num_attention_heads": "n_head"'),
    },
    "llama": {
        "rms_norm_eps": (0.1, "models.llama.modeling_llama", "eps=config.rms_norm_eps"),
        "head_dim": (12, "models.llama.modeling_llama", 'getattr(config, "head_dim"'),
        "rope_theta": (500.0, "modeling_rope_utils", 'kwargs.pop("rope_theta"'),
        "rope_scaling": (LLAMA3, "modeling_rope_utils", 'kwargs.pop("rope_scaling"'),
        "hidden_act": ("gelu", "models.llama.modeling_llama", "ACT2FN[config.hidden_act]"),
    },
    "opt": {
        "do_layer_norm_before": (True, "models.opt.modeling_opt", "config.do_layer_norm_before"),
        "word_embed_proj_dim": (48, "models.opt.modeling_opt", "config.word_embed_proj_dim"),
        "activation_function": ("gelu", "models.opt.modeling_opt", "ACT2FN[config.activation_function]"),
    },
}
# fields that HF reads and no decoder here does, where HF reads them, and the value under which they mean nothing
REFUSED: dict[str, dict[str, tuple[Any, Any, str, str]]] = {
    "gpt2": {
        "add_cross_attention": (True, False, "models.gpt2.modeling_gpt2", "if config.add_cross_attention:"),
        "is_encoder_decoder": (True, False, "generation.utils", "self.config.is_encoder_decoder"),
        "transformers_weights": (
            "other.safetensors",
            None,
            "modeling_utils",
            'getattr(config, "transformers_weights", None)',
        ),
    },
    "gptj": {
        "attribute_map": ({"n_head": "n_layer"}, {}, "configuration_utils", '__getattribute__("attribute_map")'),
        "text_config": ({"n_layer": 1}, None, "configuration_utils", '("decoder", "generator", "text_config")'),
        "fusion_config": ({"x": True}, None, "modeling_utils", 'getattr(config, "fusion_config", None)'),
    },
    "llama": {
        "sliding_window": (8, None, "cache_utils", 'getattr(layer_config, "sliding_window", None)'),
        "attention_chunk_size": (8, None, "cache_utils", 'getattr(layer_config, "attention_chunk_size", None)'),
        "kv_sharing_modes": (["reuse"], None, "cache_utils", 'getattr(config, "kv_sharing_modes", None)'),
        "layer_types": (
            ["sliding_attention"] * 2,
            ["full_attention"] * 2,
            "cache_utils",
            'getattr(config, "layer_types", None)',
        ),
        "is_causal": (False, True, "masking_utils", 'getattr(config, "is_causal", True)'),
        "partial_rotary_factor": (0.5, 1.0, "modeling_rope_utils", 'get("partial_rotary_factor", 1.0)'),
        "quantization_config": ({"bits": 4}, None, "quantizers.auto", 'getattr(config, "quantization_config", None)'),
    },
    "opt": {
        "per_layer_config": ({"0": {"ffn_dim": 8}}, None, "configuration_utils", 'kwargs.pop("per_layer_config"'),
    },
}
# fields that HF's code does not read, or reads to train or for other outputs
IGNORED: dict[str, dict[str, Any]] = {
    "gpt2": {"alibi": True, "use_flash_attn": True, "rope_theta": 1e6, "sliding_window_size": 128},
    "gptj": {"rotary": False, "scale_attn_weights": False, "parallel_residual": False, "eos_id": 7},
    "llama": {
        "unsloth_fixed": True,
        "_flash_attn_2_enabled": True,
        "use_flash_attn": False,
        "neftune_noise_alpha": 5,
        "model_name": "unsloth/tinyllama",
        "rope_interleaved": True,
        "qk_layernorm": True,
        "final_logit_softcapping": 30.0,
        "logit_scale": 0.25,
        "pruned_heads": {"0": [1]},
    },
    "opt": {"learned_embeddings": True, "scale_embeddings": True, "layernorm_embedding": True, "alibi": True},
}
SILENT: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 7, "resid_pdrop": 0.9, "summary_type": "mean", "reorder_and_upcast_attn": True},
    "gptj": {"rotary": True, "scale_attn_weights": True, "gradient_checkpointing": True},
    "llama": {
        "sliding_window": None,
        "attention_dropout": 0.9,
        "pretraining_tp": 2,
        "is_llama_config": True,
        "rope_interleaved": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "neftune_noise_alpha": None,
        "pruned_heads": {},
    },
    "opt": {"layerdrop": 0.9, "init_std": 3.0, "dropout": 0.9, "alibi": None},
}


def source(module: str) -> str:
    return inspect.getsource(importlib.import_module(f"transformers.{module}"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@contextmanager
def changed(folder: Path, fields: dict[str, Any]) -> Iterator[Path]:
    """The checkpoint with `fields` in its config.json."""
    path = folder / "config.json"
    before = path.read_text()
    config = json.loads(before)
    if "rope_theta" in fields or "rope_scaling" in fields:
        config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | fields))
    try:
        yield folder
    finally:
        path.write_text(before)


def ours(folder: Path) -> np.ndarray:
    return np.asarray(NeuronAutoModelForCausalLM.from_pretrained(folder)(IDS)[0])


def hfs(folder: Path) -> np.ndarray:
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.inference_mode():
        return hf(torch.from_numpy(IDS)).logits[0, -1].numpy()


def test_there_are_forty_fields() -> None:
    assert sum(len(fields) for table in (HONOURED, REFUSED, IGNORED) for fields in table.values()) >= 40


@pytest.mark.few(5)
@pytest.mark.parametrize(("name", "field"), [(name, field) for name in HONOURED for field in HONOURED[name]])
def test_honoured(name: str, field: str, folders: dict[str, Path]) -> None:
    value, module, line = HONOURED[name][field]
    assert line in source(module)
    fields = {field: value}
    if field == "num_attention_heads":  # of two names one
        fields["n_head"] = value
    with changed(folders[name], fields) as folder:
        np.testing.assert_allclose(ours(folder), hfs(folder), atol=1e-4)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in REFUSED for field in REFUSED[name]])
def test_refused(name: str, field: str, folders: dict[str, Path]) -> None:
    value, harmless, module, line = REFUSED[name][field]
    assert line in source(module)
    with (
        changed(folders[name], {field: value}) as folder,
        pytest.raises((ConfigError, CheckpointError), match=f"{field}.*supported"),
    ):
        NeuronAutoModelForCausalLM.from_pretrained(folder)
    with changed(folders[name], {field: harmless}) as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        NeuronAutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", IGNORED)
def test_ignored_in_one_warning_and_hf_gives_the_same(name: str, folders: dict[str, Path]) -> None:
    plain = hfs(folders[name])
    with changed(folders[name], IGNORED[name]) as folder:
        with pytest.warns(UserWarning, match="that HF does not read are ignored") as caught:
            logits = ours(folder)
        theirs = hfs(folder)
    (warning,) = (str(one.message) for one in caught if "ignore" in str(one.message))
    assert warning.endswith(f" ignored: {', '.join(repr(field) for field in sorted(IGNORED[name]))}")
    np.testing.assert_array_equal(theirs, plain)
    np.testing.assert_allclose(logits, plain, atol=1e-4)


@pytest.mark.parametrize("name", SILENT)
def test_what_is_usual_is_not_worth_a_word(name: str, folders: dict[str, Path]) -> None:
    plain = hfs(folders[name])
    with changed(folders[name], SILENT[name]) as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        np.testing.assert_allclose(ours(folder), plain, atol=1e-4)
        np.testing.assert_array_equal(hfs(folder), plain)


def test_planning_warns_once() -> None:
    with pytest.warns(UserWarning, match="ignored: 'unsloth_fixed'$") as caught:
        assert Outline.of({"model_type": "gpt2", "num_hidden_layers": 7, "unsloth_fixed": True}).layers == 7
    assert len(caught) == 1


def test_a_warning_is_short_however_many_fields_there_are() -> None:
    fields = {f"{i:05}" + "x" * 1000: 1 for i in range(10_000)}
    rope = {f"{i:05}": 1 for i in range(10_000)}
    with pytest.warns(UserWarning, match="'00000x.*'00059x{55}' and 19940 more$") as caught:
        family("llama").Config.from_hf({**fields, "rope_scaling": rope})
    assert len(str(caught[0].message)) < 5000


# what HF's code looks for in a config that has none of it, and that changes nothing
HARMLESS = {
    "__deepcopy__": "of Python",
    "__setstate__": "of Python",
    "_attn_implementation_internal": "HF takes it from no config.json",
    "_experts_implementation": "how, not what",
    "_experts_implementation_internal": "HF takes it from no config.json",
    "_rope_type_labels": "names entries of rope_parameters, which are refused",
    "mtp_layer_types": "of a head that predicts several tokens",
    "mlp_layer_types": "of mixtures of experts, to check its words",
    "number_of_conv_states": "of the cache, and of families that are not here",
    "num_heads": "for a check of sizes where there is an embed_dim",
    "output_cross_attentions": "another output",
    "vision_aspect_ratio": "of models that see",
    "vision_feature_layer": "of models that see",
    "vision_feature_select_strategy": "of models that see",
}
# what classes unlike Llama's check and drop
ROPE = {"head_dim", "max_position_embeddings", "partial_rotary_factor", "rope_parameters", "rope_theta"}


@pytest.mark.few(15)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_hf_looks_for_is_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever HF's code asks a config for, declared or not, to load a model, to run it and to generate."""
    random_model(name, FAMILIES[name][0]).save_pretrained(tmp_path)
    asked: set[str] = set()
    usual = transformers.PretrainedConfig.__getattribute__

    def recording(self: Any, key: str) -> Any:
        try:
            return usual(self, key)
        except AttributeError:
            asked.add(key)
            raise

    monkeypatch.setattr(transformers.PretrainedConfig, "__getattribute__", recording)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.set_experts_implementation("eager")
    ids = torch.from_numpy(IDS)
    hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert "quantization_config" in asked  # the recorder records

    config = family(name).Config
    fields = {f.metadata.get("hf", f.name) for f in dataclasses.fields(config)}
    known = fields | INERT | set(ONLY) | config.INERT | set(config.ONLY) | set(HARMLESS)
    assert asked <= known | (set() if issubclass(config, LlamaLikeConfig) else ROPE)
