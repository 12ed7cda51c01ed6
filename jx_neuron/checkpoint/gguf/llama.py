"""Llama models in GGUF files, converted back to Hugging Face names, layouts and config fields.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llama
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jx_neuron.checkpoint.gguf.format import GGUF, NO_TOKEN, PLAIN, Entry, Metadata, load
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError
from jx_neuron.util.arguments import shown
from jx_neuron.util.parsing import AGAIN, MOST_INT, typed

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


Size = Annotated[int, Field(ge=1, le=MOST_INT)]
Real = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Keys(BaseModel):
    """The `llama.` keys that HF's Llama can express."""

    model_config = ConfigDict(strict=True, extra="allow")
    block_count: Size
    context_length: Size
    embedding_length: Size
    feed_forward_length: Size
    vocab_size: Size | None = None
    heads: Size = Field(alias="attention.head_count")
    kv_heads: Size | None = Field(None, alias="attention.head_count_kv")
    key_length: Size | None = Field(None, alias="attention.key_length")
    value_length: Size | None = Field(None, alias="attention.value_length")
    epsilon: Real = Field(alias="attention.layer_norm_rms_epsilon")
    rotated: Size | None = Field(None, alias="rope.dimension_count")
    rope_theta: Real = Field(10000.0, alias="rope.freq_base")
    scale_linear: Factor = Field(1.0, alias="rope.scale_linear")
    scaling: str = Field("linear", alias="rope.scaling.type")
    factor: Factor | None = Field(None, alias="rope.scaling.factor")
    original_length: Size | None = Field(None, alias="rope.scaling.original_context_length")
    beta_fast: Real | None = Field(None, alias="rope.scaling.yarn_beta_fast")
    beta_slow: Real | None = Field(None, alias="rope.scaling.yarn_beta_slow")


def llama_tensors(file: GGUF, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under their HF names; a tensor without one keeps its own.

    llama.cpp orders the rows of each head of q and k for interleaved rotation. They are permuted back to HF's halves:
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

    Raises CheckpointError for another architecture, for a key that is missing or does not fit the tensors, and for one
    whose value HF's Llama cannot express.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: a GGUF file of architecture {shown(architecture)}; legal is 'llama'. "
            "Use the model's Hugging Face checkpoint (safetensors)."
        )
    if "token_embd.weight" not in file.entries:
        raise CheckpointError(f"{file.path}: there is no tensor 'token_embd.weight'; {AGAIN}.")
    fields = {k.removeprefix("llama."): v for k, v in file.metadata.items() if k.startswith("llama.")}
    keys = typed(_Keys, fields, str(file.path), prefix="llama.")
    embedding = file.entries["token_embd.weight"].shape
    layers = {layer[1] for name in file.entries if (layer := re.match(r"blk\.(\d+)\.", name))}
    head_dim = keys.key_length or keys.embedding_length // keys.heads
    for key, legal, why in (
        ("block_count", len(layers), "how many layers the tensors are of"),
        ("embedding_length", embedding[-1], "the width of token_embd.weight"),
        ("vocab_size", embedding[0], "the rows of token_embd.weight"),
        ("rope.dimension_count", head_dim, "the head size"),
        ("attention.value_length", head_dim, "the head size"),
    ):
        if (value := fields.get(key, legal)) != legal:
            raise CheckpointError(
                f"{file.path}: llama.{key} is {value}; legal is {why}, {legal}. "
                "Use the model's Hugging Face checkpoint."
            )
    for key, value in (keys.model_extra or {}).items():
        if value not in HARMLESS.get(key, ()):
            why = f"legal is {HARMLESS[key][0]!r}" if key in HARMLESS else "HF's Llama has nothing like it"
            raise CheckpointError(
                f"{file.path}: llama.{key} = {shown(value)} is not supported: {why}. "
                "Use the model's Hugging Face checkpoint."
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": keys.embedding_length,
        "intermediate_size": keys.feed_forward_length,
        "num_hidden_layers": keys.block_count,
        "num_attention_heads": keys.heads,
        "num_key_value_heads": keys.kv_heads or keys.heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.context_length,
        "rms_norm_eps": keys.epsilon,
        "rope_theta": keys.rope_theta,
        "rope_scaling": _rope_scaling(file, keys, head_dim),
        "vocab_size": embedding[0],
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
        "tie_word_embeddings": "output.weight" not in file.entries,
        **{f"{kind}_token_id": _token_id(file.metadata, kind) for kind in ("bos", "eos", "pad")},
    }


def generation_config(metadata: Metadata) -> dict[str, Any] | None:
    """HF's generation config: the bos token, and the tokens that end a turn; None where the file names none."""
    ends = [i for kind in ("eos", "eot") if (i := _token_id(metadata, kind)) is not None]
    begin = _token_id(metadata, "bos")
    if begin is None and not ends:
        return None
    return {"bos_token_id": begin, "eos_token_id": ends or None, "pad_token_id": _token_id(metadata, "pad")}


def _token_id(metadata: Metadata, kind: str) -> Any:
    token = metadata.get(f"tokenizer.ggml.{'padding' if kind == 'pad' else kind}_token_id")
    return None if token == NO_TOKEN else token


def _rope_scaling(file: GGUF, keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    """HF's `rope_scaling`."""
    factor = (keys.scale_linear if keys.factor is None else keys.factor) or 1.0
    if ROPE_FACTORS in file.entries:
        if factor != 1.0:
            raise CheckpointError(
                f"{file.path}: rope scaling {keys.scaling!r} by {factor} as well as {ROPE_FACTORS}; legal is one of "
                "them. Use the model's Hugging Face checkpoint."
            )
        return _llama3_scaling(file, head_dim, keys.rope_theta)
    if keys.scaling == "none" or (keys.scaling == "linear" and factor == 1.0):
        return None
    if keys.scaling == "linear":
        return {"rope_type": "linear", "factor": factor}
    if keys.scaling == "yarn":
        betas = {"beta_fast": keys.beta_fast, "beta_slow": keys.beta_slow}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": keys.original_length or keys.context_length,
            **{name: beta for name, beta in betas.items() if beta is not None},
        }
    raise CheckpointError(
        f"{file.path}: llama.rope.scaling.type is {keys.scaling!r}; legal are 'none', 'linear' and 'yarn'. "
        "Use the model's Hugging Face checkpoint."
    )


def _llama3_scaling(file: GGUF, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The `llama3` rope_scaling that gives the file's divisors of the frequencies; None where all are 1.

    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
    """
    low, high, original = 1.0, 4.0, 8192
    entry = file.entries[ROPE_FACTORS]
    divisors = load(file.path, entry).astype(np.float64) if entry.shape == (head_dim // 2,) else np.zeros(1)
    if (divisors == 1).all():
        return None
    factor = float(divisors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(divisors)) * 2 / head_dim)
    blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not factor >= 1 or not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} is not what Llama 3 scales its {head_dim // 2} frequencies by "
            "(low_freq_factor 1, high_freq_factor 4, 8192 positions before). "
            "Use the model's Hugging Face checkpoint."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
