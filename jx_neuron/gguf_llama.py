"""Llama models in GGUF files, seen as the Hugging Face checkpoints that they were made from.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llama
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jx_neuron.errors import CheckpointError
from jx_neuron.gguf_format import GGUF, PLAIN, Entry, Metadata, load
from jx_neuron.tensor_files import AGAIN, Array, Tensor

NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
HARMLESS: Mapping[str, tuple[Any, ...]] = {  # `llama.` keys that change nothing at these values
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
}


def llama_tensors(file: GGUF, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under their HF names; what has none keeps its own.

    llama.cpp orders the rows of each head of q and k for interleaved rotation; they go back to HF's halves:
    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (LlamaModel.permute).
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def tensor(name: str, entry: Entry) -> Tensor:
        part = next((part for part in heads if re.fullmatch(rf"blk\.\d+\.{part}\.(weight|bias)", name)), None)
        if part and entry.shape[0] % (2 * heads[part]):
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has {entry.shape[0]} rows, which {heads[part]} heads cannot "
                f"share; {AGAIN}."
            )

        def read() -> Array:
            array = load(file.path, entry)
            if not part:
                return array
            rest = array.shape[1:]  # [head, pair, half, …] → [head, half, pair, …]
            return array.reshape(heads[part], -1, 2, *rest).swapaxes(1, 2).reshape(array.shape)

        return Tensor(entry.shape, np.dtype(PLAIN.get(entry.type, np.float32)), read)

    return {_hf_name(k): tensor(k, entry) for k, entry in file.entries.items() if k != ROPE_FACTORS}


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", stem)
    i = layer[1] if layer else ""
    hf = NAMES.get(re.sub(r"^blk\.\d+\.", "blk.{i}.", stem))
    return f"{hf.format(i=i)}.{suffix}" if hf else name


def llama_config(file: GGUF) -> dict[str, Any]:
    """The `config.json` of the HF Llama that the file was made from.

    Raises CheckpointError for another architecture, for a key that is missing, and for one whose value HF's
    Llama cannot express.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: a GGUF file of architecture {architecture!r}; legal is 'llama'. "
            "Use the model's Hugging Face checkpoint (safetensors)."
        )
    keys = {k.removeprefix("llama."): v for k, v in file.metadata.items() if k.startswith("llama.")}

    def need(key: str) -> Any:
        if key not in keys:
            raise CheckpointError(f"{file.path}: the GGUF metadata lacks llama.{key}; {AGAIN}.")
        return keys.pop(key)

    if "token_embd.weight" not in file.entries:
        raise CheckpointError(f"{file.path}: there is no tensor 'token_embd.weight'; {AGAIN}.")
    width, heads = need("embedding_length"), need("attention.head_count")
    head_dim = keys.pop("attention.key_length", width // heads if isinstance(heads, int) and heads else 0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.pop("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.pop("rope.freq_base", 10000.0),
        "vocab_size": keys.pop("vocab_size", file.entries["token_embd.weight"].shape[0]),
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
        "tie_word_embeddings": "output.weight" not in file.entries,
        **{f"{kind}_token_id": _token_id(file.metadata, kind) for kind in ("bos", "eos", "pad")},
    }
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if not isinstance(config[field], int) or config[field] < 1:
            raise CheckpointError(
                f"{file.path}: {field} is {config[field]}; legal is one positive number for all layers. "
                "Use a model whose layers are all alike."
            )
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.pop(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: llama.{key} is {file.metadata[f'llama.{key}']}; legal is the head size, "
                f"{head_dim}. Use the model's Hugging Face checkpoint."
            )
    config["rope_scaling"] = _rope_scaling(file, keys, config)
    for key, value in keys.items():
        if value not in HARMLESS.get(key, ()):
            legal = f"legal is {HARMLESS[key][0]!r}" if key in HARMLESS else "HF's Llama has nothing like it"
            raise CheckpointError(
                f"{file.path}: llama.{key} = {value!r} is not supported: {legal}. "
                "Use the model's Hugging Face checkpoint."
            )
    return config


def generation_config(metadata: Metadata) -> dict[str, Any] | None:
    """HF's generation config: the token to begin with and those that end a turn; None where none is named."""
    ends = dict.fromkeys(i for kind in ("eos", "eot") if (i := _token_id(metadata, kind)) is not None)
    begin = _token_id(metadata, "bos")
    if begin is None and not ends:
        return None
    return {
        "bos_token_id": begin,
        "eos_token_id": list(ends) or None,
        "pad_token_id": _token_id(metadata, "pad"),
    }


def _token_id(metadata: Metadata, kind: str) -> int | None:
    return metadata.get(f"tokenizer.ggml.{'padding' if kind == 'pad' else kind}_token_id")


def _rope_scaling(file: GGUF, keys: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """HF's `rope_scaling`; takes what it uses out of `keys`."""
    linear = keys.pop("rope.scale_linear", 1.0)
    kind, factor = keys.pop("rope.scaling.type", "linear"), keys.pop("rope.scaling.factor", linear) or 1.0
    original = keys.pop("rope.scaling.original_context_length", None)
    if ROPE_FACTORS in file.entries:
        if factor != 1.0:
            raise CheckpointError(
                f"{file.path}: rope scaling {kind!r} by {factor} as well as {ROPE_FACTORS}; legal is one of "
                "them. Use the model's Hugging Face checkpoint."
            )
        return _llama3_scaling(file, config)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {name: keys.pop(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or config["max_position_embeddings"],
            **{name: beta for name, beta in betas.items() if beta is not None},
        }
    raise CheckpointError(
        f"{file.path}: llama.rope.scaling.type is {kind!r}; legal are 'none', 'linear' and 'yarn'. "
        "Use the model's Hugging Face checkpoint."
    )


def _llama3_scaling(file: GGUF, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `llama3` rope_scaling that gives the file's divisors of the frequencies; None where all are 1.

    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
    """
    divisors = load(file.path, file.entries[ROPE_FACTORS]).astype(np.float64)
    if (divisors == 1).all():
        return None
    low, high, original, factor = 1.0, 4.0, 8192, float(divisors.max())
    size = config["head_dim"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != blend.shape or not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} is not what Llama 3 scales its frequencies by (low_freq_factor 1, "
            "high_freq_factor 4, 8192 positions before). Use the model's Hugging Face checkpoint."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
