"""Configs of decoders that differ from Llama in their norms, windows or order: odd sizes, and every option of each."""

from typing import Any

from families_f1 import LLAMA, LLAMA3, YARN

FULL, SLIDING = "full_attention", "sliding_attention"
TYPES = {"layer_types": [FULL, SLIDING, SLIDING], "num_hidden_layers": 3}
GEMMA4 = LLAMA | {
    "head_dim": 8,
    "global_head_dim": 12,
    "hidden_size_per_layer_input": 10,
    "vocab_size_per_layer_input": 131,
}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cohere": [
        LLAMA | {"use_qk_norm": True, "logit_scale": 0.3},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "attention_bias": True, "layer_norm_eps": 0.1},
        LLAMA | {"head_dim": 20, "tie_word_embeddings": False, "rope_parameters": YARN, "num_key_value_heads": None},
    ],
    "cohere2": [
        LLAMA | {"num_hidden_layers": 5, "sliding_window": 7},
        LLAMA | TYPES | {"sliding_window": 20, "attention_bias": True, "logit_scale": 0.3, "layer_norm_eps": 0.1},
        LLAMA | {"head_dim": 20, "sliding_window_pattern": 2, "sliding_window": 9, "tie_word_embeddings": False},
    ],
    "exaone4": [
        LLAMA | {"num_hidden_layers": 5, "sliding_window": 7},
        LLAMA | TYPES | {"sliding_window": 20, "sliding_window_pattern": "LLG", "head_dim": 20, "hidden_act": "gelu"},
        LLAMA
        | {
            "layer_types": [FULL, FULL],
            "sliding_window": None,
            "tie_word_embeddings": True,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "rope_parameters": LLAMA3 | {"rope_theta": 500.0},
            "rms_norm_eps": 0.1,
        },
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 9, "sliding_window_pattern": 2},
        LLAMA | {"layer_types": [SLIDING, SLIDING], "sliding_window": 12, "rope_parameters": YARN},
    ],
    "gemma4_text": [
        # the last layers read the keys and values of the third and of the first
        GEMMA4
        | {
            "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL],
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 7,
            "final_logit_softcapping": 20.0,
        },
        GEMMA4 | {"num_hidden_layers": 7, "sliding_window": 20, "attention_bias": True},
        GEMMA4
        | TYPES
        | {
            "sliding_window": 9,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 22,
        },
        GEMMA4
        | TYPES
        | {
            "sliding_window": 9,
            "hidden_size_per_layer_input": 0,
            "head_dim": 12,
            "global_head_dim": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                FULL: LLAMA3 | {"rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        GEMMA4
        | {
            "layer_types": [SLIDING, FULL] * 3,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 5,
            "hidden_activation": "silu",
            "rms_norm_eps": 0.1,
        },
        GEMMA4
        | {
            "layer_types": [SLIDING] * 3,
            "num_hidden_layers": 3,
            "head_dim": 20,
            "sliding_window": 30,
            "num_key_value_heads": 1,
            "vocab_size_per_layer_input": 101,
        },
    ],
    "glm": [
        LLAMA | {"head_dim": 20, "rms_norm_eps": 0.01},
        LLAMA | {"head_dim": 12, "attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
        LLAMA | {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 1, "hidden_act": "gelu"},
        LLAMA | {"head_dim": 16, "num_key_value_heads": 4, "rope_parameters": YARN | {"partial_rotary_factor": 0.25}},
    ],
    "glm4": [
        LLAMA | {"head_dim": 20, "rms_norm_eps": 0.01},
        LLAMA | {"head_dim": 12, "attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
        LLAMA | {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 1, "hidden_act": "gelu"},
        LLAMA | {"head_dim": 16, "num_key_value_heads": 4, "rope_parameters": YARN | {"partial_rotary_factor": 0.25}},
    ],
    "nanochat": [
        LLAMA | {"attention_bias": True, "final_logit_softcapping": 2.0},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "rms_norm_eps": 0.1, "tie_word_embeddings": True},
        LLAMA | {"head_dim": 20, "final_logit_softcapping": None, "rope_parameters": YARN, "hidden_act": "silu"},
    ],
    "nemotron": [
        LLAMA | {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 6, "head_dim": 12},
        LLAMA | {"num_key_value_heads": 1, "partial_rotary_factor": 1.0, "norm_eps": 0.1, "tie_word_embeddings": True},
        LLAMA | {"head_dim": 24, "partial_rotary_factor": 0.25, "hidden_act": "silu", "num_key_value_heads": 4},
        LLAMA | {"rope_parameters": YARN | {"partial_rotary_factor": 1.0, "rope_theta": 500.0}, "mlp_bias": True},
    ],
    "olmo": [
        LLAMA | {"clip_qkv": 0.6, "attention_bias": True},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
        LLAMA | {"head_dim": 20, "rope_parameters": YARN, "hidden_act": "gelu", "num_key_value_heads": None},
    ],
    "olmo2": [
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 0.1},
        LLAMA | {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
        LLAMA | {"num_attention_heads": 3, "num_key_value_heads": None, "head_dim": 20, "rope_parameters": YARN},
    ],
    "olmo3": [
        LLAMA | {"num_hidden_layers": 5, "sliding_window": 7, "rope_scaling": YARN, "rope_theta": 1000.0},
        LLAMA | TYPES | {"sliding_window": 20, "num_attention_heads": 6, "num_key_value_heads": 3},
        LLAMA
        | TYPES
        | {
            "sliding_window": 9,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {FULL: LLAMA3 | {"rope_theta": 500.0}, SLIDING: {"rope_type": "default"}},
        },
    ],
}
