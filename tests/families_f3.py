"""Configs of GPT-2's and GPT-J's descendants, and of those with ALiBi: odd sizes, and every option of each."""

from typing import Any

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = SPECIAL | {"vocab_size": 101, "n_positions": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}
GPT_NEO = SPECIAL | {
    "vocab_size": 101,
    "max_position_embeddings": 96,
    "hidden_size": 48,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 5,
}
BLOOM = SPECIAL | {"vocab_size": 101, "hidden_size": 48, "n_layer": 2, "n_head": 4}
MPT = SPECIAL | {"vocab_size": 101, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
FALCON = SPECIAL | {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
NEOX = FALCON | {"intermediate_size": 90}
PHI = FALCON | {"intermediate_size": 90}
STABLELM = FALCON | {"intermediate_size": 90, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}
STARCODER2 = FALCON | {"intermediate_size": 90, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 8}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "bloom": [
        BLOOM | {"n_head": 12},
        BLOOM | {"apply_residual_connection_post_layernorm": True, "layer_norm_epsilon": 0.1},
        BLOOM | {"tie_word_embeddings": False, "n_head": 3, "n_layer": 3},
    ],
    "codegen": [
        GPT2 | {"rotary_dim": 8},
        GPT2 | {"n_embd": 64, "n_head": 8, "rotary_dim": 8, "n_inner": 90, "activation_function": "silu"},
        GPT2 | {"n_embd": 96, "n_head": 12, "rotary_dim": 4, "tie_word_embeddings": True, "layer_norm_epsilon": 0.1},
    ],
    "falcon": [
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 6, "bias": True},
        FALCON | {"ffn_hidden_size": 90, "rope_parameters": YARN},
        FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True, "activation": "relu"},
        FALCON | {"alibi": True, "num_attention_heads": 12, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
        FALCON | {"multi_query": False, "parallel_attn": True, "rope_parameters": {"rope_theta": 500.0}},
    ],
    "gpt_bigcode": [
        GPT2 | {"n_inner": 90},
        GPT2 | {"multi_query": False, "n_head": 6, "scale_attn_weights": False},
        GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    ],
    "gpt_neox": [
        NEOX | {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        NEOX | {"use_parallel_residual": False, "num_attention_heads": 3, "attention_bias": False},
        NEOX | {"tie_word_embeddings": True, "rotary_pct": 1.0, "rotary_emb_base": 700.0, "hidden_act": "relu"},
        NEOX | {"rotary_pct": 0.5, "layer_norm_eps": 0.1, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ],
    "gpt_neo": [
        GPT_NEO,
        GPT_NEO | {"attention_types": [[["local"], 1], [["global", "local", "local"], 1]], "intermediate_size": 90},
        GPT_NEO | {"num_heads": 6, "tie_word_embeddings": False, "activation_function": "relu", "window_size": 11},
    ],
    "phi": [
        PHI | {"partial_rotary_factor": 0.5},
        PHI | {"qk_layernorm": True, "num_key_value_heads": 2, "rope_parameters": YARN, "layer_norm_eps": 0.1},
        PHI | {"head_dim": 20, "num_key_value_heads": 1},
        PHI | {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_act": "silu", "rope_theta": 500.0},
    ],
    "stablelm": [
        STABLELM | {"hidden_size": 64, "partial_rotary_factor": 0.25},
        STABLELM | {"qk_layernorm": True, "use_qkv_bias": True, "num_attention_heads": 6, "layer_norm_eps": 0.1},
        STABLELM | {"use_parallel_residual": True, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
        STABLELM | {"use_parallel_residual": True, "qk_layernorm": True, "num_key_value_heads": 4},
    ],
    "starcoder2": [
        STARCODER2 | {"sliding_window": 7},
        STARCODER2 | {"use_bias": False, "num_attention_heads": 6, "num_key_value_heads": 1, "norm_epsilon": 0.1},
        STARCODER2 | {"tie_word_embeddings": False, "head_dim": 20, "hidden_act": "relu", "rope_parameters": YARN},
    ],
    "mpt": [
        MPT | {"n_heads": 12},
        MPT | {"attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.5}, "layer_norm_epsilon": 0.1},
        MPT | {"tie_word_embeddings": False, "n_layers": 3},
    ],
}
