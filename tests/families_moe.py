"""Configs of decoders with experts: odd sizes, and every option of each."""

from typing import Any

from families_f1 import LLAMA, YARN

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 22}
LOCAL = {"intermediate_size": 22, "num_local_experts": 6, "num_experts_per_tok": 2}
# more experts than tokens choose, so that a decode step takes those alone
MANY = {"num_experts": 64, "num_experts_per_tok": 3, "moe_intermediate_size": 9}
MANY_LOCAL = {"intermediate_size": 9, "num_local_experts": 64, "num_experts_per_tok": 3}
SPARSE = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}

ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 22}
MOE = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 22, "num_hidden_layers": 3}
FOUR = {
    "head_dim": 16,
    "intermediate_size": 22,
    "intermediate_size_mlp": 90,
    "num_hidden_layers": 4,
    "floor_scale": 5,
}
MSCALES = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 96,
    "rope_theta": 500.0,
}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ernie4_5_moe": [
        LLAMA | MOE | {"use_bias": True, "moe_num_shared_experts": 2},
        LLAMA | MOE | {"moe_num_experts": 64, "moe_k": 3, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
        LLAMA | MOE | {"num_hidden_layers": 6, "moe_layer_interval": 2, "moe_layer_end_index": 4, "moe_norm_min": 0.9},
    ],
    "glm4_moe": [
        LLAMA | ROUTED | {"attention_bias": True, "use_qk_norm": True, "head_dim": 16, "routed_scaling_factor": 1.5},
        LLAMA | ROUTED | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2},
        LLAMA
        | ROUTED
        | {
            "head_dim": 16,
            "n_routed_experts": 64,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 1.0,
        },
    ],
    "gpt_oss": [
        LLAMA | LOCAL | {"head_dim": 20, "sliding_window": 7, "num_hidden_layers": 3},
        LLAMA | MANY_LOCAL | {"head_dim": 16, "sliding_window": 20, "attention_bias": False, "swiglu_limit": 0.5},
        LLAMA
        | LOCAL
        | {
            "head_dim": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "swiglu_alpha": 1.0,
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ],
    "llama4_text": [
        LLAMA | FOUR | {"num_local_experts": 6, "attention_chunk_size": 7, "interleave_moe_layer_step": 2},
        LLAMA
        | FOUR
        | {
            "num_local_experts": 64,
            "num_experts_per_tok": 3,
            "attention_chunk_size": None,
            "use_qk_norm": False,
            "attention_bias": True,
            "no_rope_layers": [0, 1, 1],
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
        LLAMA | FOUR | {"moe_layers": [0, 3], "attention_chunk_size": 20, "attn_temperature_tuning": False},
    ],
    "minimax_m2": [
        LLAMA | LOCAL | {"head_dim": 20, "partial_rotary_factor": 0.5},
        LLAMA | MANY_LOCAL | {"head_dim": 16, "rotary_dim": 8, "tie_word_embeddings": True},
        LLAMA | LOCAL | {"head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ],
    "phimoe": [
        LLAMA | LOCAL | {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.4},
        LLAMA | MANY_LOCAL | {"rope_parameters": MSCALES, "router_jitter_noise": 0.2, "sliding_window": 20},
        LLAMA | LOCAL | {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 1},
    ],
    "granitemoe": [
        LLAMA
        | LOCAL
        | {
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        LLAMA | MANY_LOCAL | {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 1},
    ],
    "mixtral": [
        LLAMA | LOCAL | {"sliding_window": 7},
        LLAMA | MANY_LOCAL | {"head_dim": 20, "tie_word_embeddings": True, "hidden_act": "gelu"},
        LLAMA | LOCAL | {"num_experts_per_tok": 6, "rope_parameters": {"rope_theta": 500.0}},
    ],
    "olmoe": [
        LLAMA | LOCAL | {"norm_topk_prob": True, "clip_qkv": 0.8},
        LLAMA | MANY_LOCAL | {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": None},
        LLAMA | LOCAL | {"num_attention_heads": 6, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    ],
    "qwen2_moe": [
        LLAMA | EXPERTS | SPARSE | {"shared_expert_intermediate_size": 37, "norm_topk_prob": True},
        LLAMA | MANY | {"shared_expert_intermediate_size": 14, "qkv_bias": False, "tie_word_embeddings": True},
        LLAMA
        | EXPERTS
        | {
            "num_hidden_layers": 5,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 3,
        },
    ],
    "qwen3_moe": [
        LLAMA | MANY | {"head_dim": 20, "norm_topk_prob": True},
        LLAMA | EXPERTS | SPARSE | {"attention_bias": True, "tie_word_embeddings": True},
        LLAMA
        | EXPERTS
        | {"use_sliding_window": True, "sliding_window": 7, "hidden_act": "gelu", "rope_parameters": YARN},
    ],
}
