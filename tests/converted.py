"""HF's models as GGUF files, as llama.cpp's converter writes them.

https://github.com/ggml-org/llama.cpp/tree/master/conversion, with which tests/test_gguf_converted.py compares.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import RopeScalingType

ARCHITECTURES = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "hunyuan_v1_dense": "hunyuan-dense",
    "ministral3": "mistral3",
    "mistral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
}
PAIRED = "arcee granite llama mistral ministral3 olmo smollm3".split()
ONE_ADDED = "gemma gemma2 gemma3_text nemotron".split()
LAYER_NORM = (
    "bloom cohere cohere2 falcon gpt2 gpt_bigcode gpt_neox gptj mpt nemotron olmo phi stablelm starcoder2".split()
)
WINDOWED = "cohere2 exaone4 gemma2 gemma3_text gemma4_text olmo3 phi3".split()
SCALES = {
    "attention_multiplier": "attention_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "clip_qkv": "clamp_kqv",
    "embedding_multiplier": "embedding_scale",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "logits_scaling": "logit_scale",
    "residual_multiplier": "residual_scale",
    "use_parallel_residual": "parallel_residual",
}


class Converter:
    """Of an HF model in memory."""

    def __init__(self, model: Any, path: Path):
        self.config = model.config.to_dict()
        self.type = self.config["model_type"]
        architecture = ARCHITECTURES.get(self.type, self.type)
        self.writer = gguf.GGUFWriter(path, architecture)
        self.layers = self.first("num_hidden_layers", "n_layer", "n_layers")
        self.d, self.n = (
            self.first("hidden_size", "n_embd", "d_model"),
            self.first("num_attention_heads", "n_head", "n_heads"),
        )
        self.k = 1 if self.type == "gpt_bigcode" else self.first("num_key_value_heads", "num_kv_heads", usual=self.n)
        self.h = self.first("head_dim", usual=self.d // self.n)
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(kinds[architecture], self.layers)
        self.state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
        if self.config.get("tie_word_embeddings"):
            self.state = {n: a for n, a in self.state.items() if n not in ("lm_head.weight", "embed_out.weight")}

    def first(self, *names: str, usual: Any = None) -> Any:
        return next((self.config[name] for name in names if self.config.get(name) is not None), usual)

    def write(self) -> None:
        self.keys()
        self.rope()
        for name, array in self.state.items():
            self.tensor(name, array)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def keys(self) -> None:
        add, config = self.writer, self.config
        add.add_block_count(self.layers)
        add.add_context_length(
            self.first("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", usual=48)
        )
        add.add_embedding_length(self.d)
        add.add_feed_forward_length(self.first("intermediate_size", "n_inner", "ffn_hidden_size", usual=4 * self.d))
        add.add_head_count(self.n)
        add.add_head_count_kv(self.k)
        if self.type in LAYER_NORM:
            add.add_layer_norm_eps(
                self.first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", usual=1e-5)
            )
        else:
            add.add_layer_norm_rms_eps(config["rms_norm_eps"])
        if config.get("head_dim") and self.type not in ("gemma4_text", "glm", "granite", "phi3"):
            add.add_key_length(self.h)
            add.add_value_length(self.h)
        for field, key in SCALES.items():
            if config.get(field) is not None and self.type not in ("exaone4", "mpt"):
                getattr(add, f"add_{key}")(config[field])
        if self.type in WINDOWED:
            add.add_sliding_window(config.get("sliding_window") or 0)
        if self.type in ("exaone4", "olmo3") and config.get("sliding_window"):
            add.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        if self.type == "falcon":
            add.add_tensor_data_layout("jploski")
        if self.type == "mpt":
            add.add_max_alibi_bias(8.0)
            if config["attn_config"]["clip_qkv"] is not None:
                add.add_clamp_kqv(config["attn_config"]["clip_qkv"])
        if self.type == "gemma4_text":
            self.layers_of_types()
        if self.type == "gptj":
            add.add_rope_dimension_count(config["rotary_dim"])
        if self.type == "apertus":
            for name in ("alpha_p", "alpha_n", "beta", "eps"):
                numbers = [self.state.pop(f"model.layers.{i}.mlp.act_fn.{name}").item() for i in range(self.layers)]
                getattr(add, f"add_xielu_{name}")(numbers)

    def layers_of_types(self) -> None:
        add, config, layers = self.writer, self.config, range(self.layers)
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        wide = [self.state[f"model.layers.{i}.self_attn.q_norm.weight"].shape[0] for i in layers]
        full = wide[slides.index(False)]
        own = self.layers - config["num_kv_shared_layers"]
        keys = [self.state.get(f"model.layers.{i}.self_attn.k_proj.weight") for i in layers]
        by_type = {slide: len(rows) // h for slide, h, rows in zip(slides, wide, keys, strict=True) if rows is not None}
        for add_to, value in (
            (add.add_key_length, full),
            (add.add_value_length, full),
            (add.add_key_length_swa, self.h),
            (add.add_value_length_swa, self.h),
            (add.add_rope_dimension_count, full),
            (add.add_rope_dimension_count_swa, self.h),
            (add.add_shared_kv_layers, config["num_kv_shared_layers"]),
            (add.add_embedding_length_per_layer_input, config["hidden_size_per_layer_input"]),
            (add.add_sliding_window_pattern, slides),
            (add.add_feed_forward_length, [config["intermediate_size"] * (1 + (i >= own)) for i in layers]),
            (add.add_head_count_kv, [by_type[slide] for slide in slides]),
        ):
            if add_to != add.add_feed_forward_length or config["use_double_wide_mlp"]:
                add_to(value)
        theta = config["rope_parameters"]
        add.add_rope_freq_base(theta["full_attention"]["rope_theta"])
        add.add_rope_freq_base_swa(theta["sliding_attention"]["rope_theta"])
        rotated = int(full * theta["full_attention"]["partial_rotary_factor"] / 2)
        divisors = np.array([1.0] * rotated + [1e30] * (full // 2 - rotated), np.float32)
        add.add_tensor("rope_freqs.weight", divisors)

    def rope(self) -> None:
        add, fields = self.writer, self.config.get("rope_parameters")
        if not fields or self.type == "gemma4_text":
            return
        full = fields.get("full_attention", fields)
        theta, kind, factor = full["rope_theta"], full["rope_type"], full.get("factor")
        rotated = int(self.h * full.get("partial_rotary_factor", 1.0))
        add.add_rope_dimension_count(rotated)
        original = self.first("original_max_position_embeddings") or full.get("original_max_position_embeddings")
        if kind == "dynamic":
            theta *= full["alpha"] ** (self.h / (self.h - 2))
        add.add_rope_freq_base(theta)
        if "sliding_attention" in fields:
            add.add_rope_freq_base_swa(fields["sliding_attention"]["rope_theta"])
        if kind in ("linear", "yarn"):
            add.add_rope_scaling_type(RopeScalingType(kind))
            add.add_rope_scaling_factor(factor)
        if kind in ("yarn", "longrope"):
            add.add_rope_scaling_orig_ctx_len(original)
        if self.type == "ministral3":
            add.add_rope_scaling_yarn_log_mul(full["mscale_all_dim"])
            add.add_attn_temperature_scale(full["llama_4_scaling_beta"])
        if kind == "longrope":
            scale = self.config["max_position_embeddings"] / original
            add.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
            for length in ("short", "long"):
                add.add_tensor(f"rope_factors_{length}.weight", np.array(full[f"{length}_factor"], np.float32))
        if kind == "llama3":
            low, high = full["low_freq_factor"], full["high_freq_factor"]
            wavelengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
            smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
            add.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).astype(np.float32))

    def tensor(self, name: str, array: np.ndarray) -> None:
        name = f"{name}.weight" if name.endswith("layer_scalar") else name
        stem, _, suffix = name.rpartition(".")
        head, norms, number = stem.partition(".norms.")
        if norms:  # one a head, which become one
            if number == "0":
                heads = self.n if "q_layernorm" in head else self.k
                stacked = np.stack([self.state[f"{head}.norms.{i}.weight"] for i in range(heads)])
                self.writer.add_tensor(f"{self.names.get_name(head)}.weight", stacked)
            return
        ours = self.names.get_name(stem) or self.names.get_name(stem.removeprefix("transformer."))
        assert ours, name
        if self.type == "gpt2" and suffix == "weight" and any(part in stem for part in ("c_attn", "c_proj", "c_fc")):
            array = array.T
        if self.type in ONE_ADDED and name.endswith("norm.weight"):
            array = array + 1
        if self.type in PAIRED and ours.endswith(("attn_q", "attn_k")):
            heads = self.n if ours.endswith("attn_q") else self.k
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if self.type in ("bloom", "falcon", "gpt_neox") and ours.endswith("attn_qkv"):
            k = self.k if self.type == "falcon" else self.n
            grouped = array.reshape(k, self.n // k + 2, self.h, *array.shape[1:])
            parts = [grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]]
            array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])
        self.writer.add_tensor(f"{ours}.{suffix}", np.ascontiguousarray(array))
