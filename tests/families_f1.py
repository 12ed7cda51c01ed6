"""Configs of Llama's nearest descendants: odd sizes, and every option of each."""

from typing import Any

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = SPECIAL | {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}

WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
    "original_max_position_embeddings": 48,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20, "attention_bias": True},
    ],
    "qwen2": [
        LLAMA | WINDOW | {"num_hidden_layers": 3},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
        LLAMA | {"rope_parameters": YARN, "num_key_value_heads": None},
        LLAMA | WINDOW | {"layer_types": ["sliding_attention", "full_attention"], "hidden_act": "gelu"},
    ],
    "qwen3": [
        LLAMA | WINDOW | {"head_dim": 20, "num_hidden_layers": 3},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "attention_bias": True},
        LLAMA | {"head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 0.1, "num_key_value_heads": 1},
    ],
}
