"""Fields of HF's config that take more than a key of a GGUF file.

https://github.com/ggml-org/llama.cpp/tree/master/conversion writes the keys.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jx_neuron.checkpoint.gguf.keys import DIVISORS, INSTEAD, Header
from jx_neuron.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA4_SEVERAL = ("feed_forward_length", "attention.head_count_kv")
MOST_DIVISOR = 1e30  # of a frequency that means none
TEMPERATURE = "attention.temperature_scale"


def query_scalar(header: Header, layers: int) -> dict[str, Any]:
    """Gemma's query_pre_attn_scalar: the head size, but in models of 27 billion weights, known by `layers`.

    https://github.com/ggml-org/llama.cpp/tree/master/src/models: f_attention_scale
    """
    large = header.keys.block_count == layers
    return {"query_pre_attn_scalar": header.keys.embedding_length // header.keys.heads if large else header.head_dim}


def full_alone(header: Header, theta: float) -> dict[str, Any]:
    """rope_parameters by type of layer: those with a window have another theta, by default `theta`, and no scaling."""
    sliding = {"rope_type": "default", "rope_theta": header.windows.rope_theta or theta}
    return {FULL: header.rope(), SLIDING: sliding}


def proportional(header: Header) -> dict[str, Any]:
    """Of full layers RoPE of the first frequencies of a head, whose other divisors are great, and of the others' whole.

    https://github.com/ggml-org/llama.cpp/blob/master/conversion/gemma.py (Gemma4Model.generate_extra_tensors)
    """
    divisors = header.factors(DIVISORS)
    part = int(np.count_nonzero(divisors == 1)) / len(divisors)
    if not ((divisors == 1) | (divisors >= MOST_DIVISOR)).all():
        raise CheckpointError(f"{header.file.path}: {DIVISORS} has other divisors than 1 and {MOST_DIVISOR}. {INSTEAD}")
    theta, swa = header.windows.rope_theta or 10000.0, header.fields
    if swa.get("rope.dimension_count_swa") != swa.get("attention.key_length_swa"):
        raise header.refusal("rope.dimension_count_swa", swa.get("rope.dimension_count_swa"), "legal is the head size")
    full = {"rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": header.keys.rope_theta}
    return {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": theta}}


def gemma4(header: Header) -> dict[str, Any]:
    types = windowed(6)(header)["layer_types"]
    full = types.index(FULL) if FULL in types else 0
    inner, heads = (header.by_layer(key) for key in GEMMA4_SEVERAL)
    table = header.file.entries.get("per_layer_token_embd.weight")
    return {
        **windowed(6)(header),
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in header.file.entries,
        "intermediate_size": inner[0],
        "use_double_wide_mlp": inner[-1] == 2 * inner[0],
        "num_key_value_heads": heads[types.index(SLIDING) if SLIDING in types else 0],
        "num_global_key_value_heads": heads[full],
        "vocab_size_per_layer_input": table.shape[0] if table else header.file.entries["token_embd.weight"].shape[0],
    }


def tempered(header: Header) -> dict[str, Any]:
    scale = header.fields.get(TEMPERATURE)
    return header.rope() | ({} if scale is None else {"llama_4_scaling_beta": scale})


def mistral3(header: Header) -> dict[str, Any]:
    """Mistral Small 3 has the same architecture as Ministral 3, whose queries grow with their position."""
    return {} if TEMPERATURE in header.fields else {"model_type": "mistral", "sliding_window": None}


def phi3(header: Header) -> dict[str, Any]:
    original = header.keys.original_length or header.keys.context_length
    return {"original_max_position_embeddings": original, "sliding_window": header.windows.size or None}


def windowed(period: int) -> Callable[[Header], dict[str, Any]]:
    """Of layers all but each `period`-th of which have a window."""

    def fields(header: Header) -> dict[str, Any]:
        window, layers = header.windows.size or None, header.keys.block_count
        return {"sliding_window": window, "layer_types": header.sliding(period) if window else [FULL] * layers}

    return fields


def falcon(header: Header) -> dict[str, Any]:
    k, norms = header.kv_heads, 2 if header.has("attn_norm_2.weight") else 1
    if k == 1 and norms == 1:
        return {"multi_query": True, "new_decoder_architecture": False}
    return {"new_decoder_architecture": True, "num_kv_heads": k, "num_ln_in_parallel_attn": norms}
