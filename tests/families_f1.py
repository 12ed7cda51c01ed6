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

GPT2 = SPECIAL | {"vocab_size": 101, "n_positions": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}
OPT = SPECIAL | {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 90,
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

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BETA = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}
BIASES = {"attention_bias": True, "mlp_bias": True}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "apertus": [
        LLAMA | {"attention_bias": True},
        LLAMA | {"rope_parameters": {"rope_theta": 500.0}, "hidden_act": "gelu", "tie_word_embeddings": True},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": None, "rms_norm_eps": 0.1},
    ],
    "arcee": [
        LLAMA | BIASES,
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 20, "tie_word_embeddings": True},
        LLAMA | {"hidden_act": "silu", "rope_parameters": YARN, "num_key_value_heads": None},
    ],
    "ernie4_5": [
        LLAMA | {"head_dim": 20, "use_bias": True},
        LLAMA | {"head_dim": None, "tie_word_embeddings": False, "num_attention_heads": 6, "num_key_value_heads": 3},
    ],
    "gpt2": [
        GPT2 | {"n_head": 6, "scale_attn_by_inverse_layer_idx": True},
        GPT2 | {"n_inner": 90, "activation_function": "quick_gelu", "tie_word_embeddings": False},
    ],
    "gptj": [
        GPT2 | {"rotary_dim": 8},
        GPT2 | {"rotary_dim": 12, "n_inner": 90, "tie_word_embeddings": True},
    ],
    "granite": [
        LLAMA
        | BIASES
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        LLAMA | {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 1, "logits_scaling": 2},
    ],
    "helium": [
        LLAMA | {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
        LLAMA | {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ],
    "hunyuan_v1_dense": [
        LLAMA | {"head_dim": 20, "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0}},
        LLAMA | {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
        LLAMA
        | {
            "head_dim": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 30,
        },
    ],
    "ministral3": [
        LLAMA | {"head_dim": 20, "rope_parameters": BETA},
        LLAMA | {"head_dim": 12, "rope_parameters": BETA, "sliding_window": 7, "tie_word_embeddings": True},
        LLAMA | {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 1},
    ],
    "mistral": [
        LLAMA | {"sliding_window": 7},
        LLAMA | {"sliding_window": None, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 20},
        LLAMA | {"tie_word_embeddings": True, "rope_parameters": YARN},
    ],
    "opt": [
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 30},
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
    ],
    "phi3": [
        LLAMA
        | {
            "hidden_size": 64,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 48,
        },
        LLAMA | {"sliding_window": 7, "num_key_value_heads": None, "tie_word_embeddings": True},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "partial_rotary_factor": 0.75},
        LLAMA | {"hidden_size": 32, "rope_scaling": LONGROPE | {"type": "su"}, "rope_theta": 500.0},
    ],
    "seed_oss": [
        LLAMA | {"head_dim": 20},
        LLAMA | {"head_dim": 12, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": None},
    ],
    "smollm3": [
        LLAMA | WINDOW | {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
        LLAMA | BIASES | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": False},
        LLAMA
        | {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": LLAMA3 | {"rope_theta": 500.0},
        },
    ],
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
