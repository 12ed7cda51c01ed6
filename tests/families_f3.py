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

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "bloom": [
        BLOOM | {"n_head": 6},
        BLOOM | {"apply_residual_connection_post_layernorm": True, "layer_norm_epsilon": 0.1},
        BLOOM | {"tie_word_embeddings": False, "n_head": 3, "n_layer": 3},
    ],
    "codegen": [
        GPT2 | {"rotary_dim": 8},
        GPT2 | {"n_embd": 64, "n_head": 8, "rotary_dim": 8, "n_inner": 90, "activation_function": "silu"},
        GPT2 | {"n_embd": 96, "n_head": 12, "rotary_dim": 4, "tie_word_embeddings": True, "layer_norm_epsilon": 0.1},
    ],
    "gpt_bigcode": [
        GPT2 | {"n_inner": 90},
        GPT2 | {"multi_query": False, "n_head": 6, "scale_attn_weights": False},
        GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    ],
    "gpt_neo": [
        GPT_NEO,
        GPT_NEO | {"attention_types": [[["local"], 1], [["global", "local", "local"], 1]], "intermediate_size": 90},
        GPT_NEO | {"num_heads": 6, "tie_word_embeddings": False, "activation_function": "relu", "window_size": 11},
    ],
    "mpt": [
        MPT | {"n_heads": 6},
        MPT | {"attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.5}, "layer_norm_epsilon": 0.1},
        MPT | {"tie_word_embeddings": False, "n_layers": 3},
    ],
}
