"""Configs of Gemma: odd sizes, and every option of each."""

from typing import Any

from families_f1 import LLAMA, YARN

TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
GEMMA = LLAMA | {"head_dim": 20}
CAPS = {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gemma": [
        GEMMA | {"attention_bias": True},
        GEMMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "gelu"},
        GEMMA | {"tie_word_embeddings": False, "rope_parameters": YARN, "hidden_act": "silu"},
    ],
    "gemma2": [
        GEMMA | CAPS | {"num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 24},
        GEMMA | {"num_hidden_layers": 3, "layer_types": TYPES, "sliding_window": 20, "attention_bias": True},
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ],
    "gemma3_text": [
        GEMMA | {"num_hidden_layers": 7, "sliding_window": 7, "query_pre_attn_scalar": 24},
        GEMMA | CAPS | {"num_hidden_layers": 3, "layer_types": TYPES, "sliding_window": 20, "attention_bias": True},
        GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": TYPES,
            "sliding_window": 9,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ],
}
