"""Configs of HF's models that a GGUF file can hold: odd sizes, and every option that llama.cpp has of each."""

from typing import Any

from families_f1 import BIASES, GPT2, LLAMA, LLAMA3, LONGROPE, YARN
from families_f2 import FULL, GEMMA4, SLIDING, TYPES
from families_f3 import BLOOM, FALCON, MPT, NEOX, PHI, STABLELM, STARCODER2

ONE_KEY_HEAD = {"num_attention_heads": 6, "num_key_value_heads": 1}
WIDE = {"head_dim": 20}
GEMMA = LLAMA | WIDE | {"query_pre_attn_scalar": 20, "hidden_activation": "gelu_pytorch_tanh"}

MODELS: dict[str, list[dict[str, Any]]] = {
    "apertus": [LLAMA | {"attention_bias": True}],
    "arcee": [LLAMA | WIDE | BIASES, LLAMA | ONE_KEY_HEAD | {"rope_parameters": YARN, "tie_word_embeddings": True}],
    "bloom": [BLOOM | {"n_head": 12}],
    "cohere": [LLAMA | {"use_qk_norm": True, "logit_scale": 0.3}, LLAMA | ONE_KEY_HEAD | {"attention_bias": True}],
    "cohere2": [LLAMA | {"num_hidden_layers": 5, "sliding_window": 7, "logit_scale": 0.3, "rotary_pct": 1.0}],
    "ernie4_5": [LLAMA | WIDE | {"use_bias": True}, LLAMA | ONE_KEY_HEAD | {"tie_word_embeddings": False}],
    "exaone4": [
        LLAMA | {"num_hidden_layers": 5, "sliding_window": 7, "sliding_window_pattern": 4},
        LLAMA | WIDE | TYPES | {"sliding_window": 9},
        LLAMA
        | ONE_KEY_HEAD
        | {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3},
    ],
    "falcon": [
        FALCON | {"num_attention_heads": 6, "new_decoder_architecture": True, "num_kv_heads": 2},
        FALCON | {"num_kv_heads": 1},
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ],
    "gemma": [LLAMA | WIDE, LLAMA | ONE_KEY_HEAD | {"head_dim": 8}],
    "gemma2": [
        GEMMA
        | {
            "num_hidden_layers": 3,
            "sliding_window": 7,
            "attn_logit_softcapping": 0.7,
            "final_logit_softcapping": 2.0,
        }
    ],
    "gemma3_text": [
        GEMMA | {"num_hidden_layers": 7, "sliding_window": 7},
        GEMMA
        | {
            "num_hidden_layers": 7,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ],
    "gemma4_text": [
        GEMMA4
        | {
            "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "num_hidden_layers": 8,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "sliding_window": 7,
            "final_logit_softcapping": 20.0,
        },
        GEMMA4
        | TYPES
        | {
            "layer_types": [FULL, SLIDING, FULL],
            "sliding_window": 9,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 101,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
        },
    ],
    "glm": [LLAMA | {"head_dim": 12, "rms_norm_eps": 1e-5}],
    "glm4": [LLAMA | WIDE, LLAMA | {"head_dim": 16, "rope_parameters": YARN | {"partial_rotary_factor": 0.25}}],
    "gpt2": [GPT2 | {"n_head": 6, "n_ctx": 96}, GPT2 | {"n_ctx": 96, "tie_word_embeddings": False}],
    "gpt_bigcode": [GPT2],
    "gpt_neox": [
        NEOX | {"rotary_pct": 0.5},
        NEOX | {"use_parallel_residual": False, "num_attention_heads": 3, "rotary_pct": 0.25},
    ],
    "gptj": [GPT2 | {"rotary_dim": 8}, GPT2 | {"rotary_dim": 12, "n_inner": 90, "tie_word_embeddings": True}],
    "granite": [
        LLAMA
        | BIASES
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ],
    "hunyuan_v1_dense": [
        LLAMA
        | WIDE
        | {
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0, "rope_theta": 10000.0},
        },
        LLAMA | {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ],
    "llama": [
        LLAMA | WIDE | BIASES,
        LLAMA | ONE_KEY_HEAD | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}},
        LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    ],
    "mistral": [LLAMA | {"sliding_window": None, "rope_parameters": YARN}],
    "ministral3": [
        LLAMA | WIDE | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}},
        LLAMA
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.2}}
        | ONE_KEY_HEAD,
    ],
    "mpt": [MPT | {"n_heads": 12}, MPT | {"attn_config": {"clip_qkv": 0.4}}],
    "nemotron": [
        LLAMA | BIASES | {"partial_rotary_factor": 0.5},
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 1.0}},
    ],
    "olmo": [LLAMA | {"clip_qkv": 0.4}, LLAMA | ONE_KEY_HEAD | {"tie_word_embeddings": True}],
    "olmo2": [LLAMA | {"attention_bias": True}, LLAMA | ONE_KEY_HEAD | {"rms_norm_eps": 0.1}],
    "olmo3": [
        LLAMA | {"num_hidden_layers": 5, "sliding_window": 7},
        LLAMA
        | TYPES
        | {
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ],
    "phi": [PHI | {"partial_rotary_factor": 0.5, "intermediate_size": 192}],
    "phi3": [
        LLAMA
        | {
            "hidden_size": 64,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 48,
        },
        LLAMA | {"sliding_window": 7, "original_max_position_embeddings": 96, "num_key_value_heads": None},
    ],
    "qwen2": [LLAMA | ONE_KEY_HEAD | {"tie_word_embeddings": True}, LLAMA | {"rope_parameters": YARN}],
    "qwen3": [LLAMA | WIDE | {"attention_bias": True}, LLAMA | ONE_KEY_HEAD | {"head_dim": 12}],
    "seed_oss": [
        LLAMA | WIDE,
        LLAMA | {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
    "smollm3": [LLAMA | BIASES | {"num_hidden_layers": 5, "tie_word_embeddings": False}],
    "stablelm": [
        STABLELM | {"hidden_size": 64, "partial_rotary_factor": 0.25},
        STABLELM | {"qk_layernorm": True, "use_qkv_bias": True, "num_attention_heads": 6},
        STABLELM | {"use_parallel_residual": True, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
    ],
    "starcoder2": [STARCODER2, STARCODER2 | ONE_KEY_HEAD | {"use_bias": False, "tie_word_embeddings": False}],
}
