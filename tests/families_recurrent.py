"""Configs of families with recurrent layers: odd sizes, and every option of each."""

from typing import Any

from families_f1 import LLAMA, SPECIAL, YARN
from families_moe import EXPERTS, LOCAL, MANY, MANY_LOCAL, SPARSE

LFM2 = LLAMA | {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 8}
LFM2_MOE = (
    LLAMA | EXPERTS | {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}
)
MAMBA2 = SPECIAL | {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 16,
    "n_groups": 1,
    "state_size": 20,
    "chunk_size": 8,
}
FALCON_H1 = LLAMA | {
    "mamba_d_ssm": 60,
    "mamba_n_heads": 6,
    "mamba_n_groups": 1,
    "mamba_d_state": 20,
    "mamba_chunk_size": 8,
    "mamba_rms_norm": True,
}
SCALES = {
    "mlp_multipliers": [0.7, 1.3],
    "ssm_multipliers": [0.8, 1.2, 0.9, 1.1, 0.7],
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.6,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.4,
    "key_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.4,
}
GRANITE = LLAMA | {
    "num_local_experts": 0,
    "shared_intermediate_size": 90,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 20,
    "mamba_chunk_size": 8,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
QWEN3_5 = LLAMA | {
    "head_dim": 20,
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.4},
}
QWEN_MOE = QWEN3_5 | EXPERTS | {"shared_expert_intermediate_size": 37}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "falcon_h1": [
        FALCON_H1 | SCALES,
        FALCON_H1
        | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "projectors_bias": True}
        | {"mamba_n_groups": 2, "mamba_norm_before_gate": False, "attention_out_multiplier": 0.5},
        FALCON_H1 | SCALES | {"mamba_rms_norm": False, "mamba_conv_bias": False, "tie_word_embeddings": True},
        FALCON_H1
        | {"mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_n_groups": 4, "hidden_act": "relu", "mamba_d_conv": 2}
        | {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 20, "rope_parameters": YARN},
    ],
    "granitemoehybrid": [
        GRANITE | LOCAL | {"embedding_multiplier": 3.0},
        GRANITE | {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
        GRANITE
        | {"mamba_n_groups": 1, "mamba_proj_bias": True, "attention_bias": True, "position_embedding_type": "rope"},
        GRANITE
        | {"mamba_n_heads": 8, "mamba_n_groups": 8, "mamba_d_conv": 2, "mamba_conv_bias": False, "hidden_act": "relu"}
        | {"num_attention_heads": 6, "num_key_value_heads": None, "tie_word_embeddings": True},
        GRANITE | MANY_LOCAL | {"tie_word_embeddings": True, "logits_scaling": 3.0, "num_key_value_heads": 1},
    ],
    "lfm2": [
        LFM2 | {"conv_bias": True},
        LFM2 | {"conv_L_cache": 5, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
        LFM2 | {"full_attn_idxs": None, "layer_types": ["conv", "conv", "full_attention"], "norm_eps": 0.1},
        LFM2 | {"num_attention_heads": 6, "num_key_value_heads": 1, "full_attn_idxs": [2], "conv_L_cache": 2},
        LFM2 | {"block_ffn_dim_multiplier": 1.3, "full_attn_idxs": [0, 2], "rope_parameters": YARN},
    ],
    "lfm2_moe": [
        LFM2_MOE | {"conv_bias": True},
        LFM2_MOE | MANY | {"num_dense_layers": 0, "use_expert_bias": False, "norm_topk_prob": False, "norm_eps": 0.1},
        LFM2_MOE
        | {"layer_types": ["full_attention", "conv", "conv"], "conv_L_cache": 5, "routed_scaling_factor": 1.5}
        | {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": False, "rope_parameters": YARN},
    ],
    "mamba2": [
        MAMBA2 | {"n_groups": 2},
        MAMBA2 | {"use_bias": True, "conv_kernel": 3, "tie_word_embeddings": True, "layer_norm_epsilon": 0.1},
        MAMBA2 | {"n_groups": 8, "num_heads": 8, "head_dim": 12, "use_conv_bias": False, "hidden_act": "relu"},
        MAMBA2 | {"n_groups": 3, "expand": 3, "num_heads": 9, "num_hidden_layers": 3, "residual_in_fp32": False},
    ],
    "qwen3_5_moe_text": [
        QWEN_MOE | {"attention_bias": True},
        QWEN_MOE | MANY | {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "num_hidden_layers": 2},
        QWEN_MOE | {"layer_types": ["full_attention", "linear_attention", "linear_attention"], "hidden_act": "relu"},
    ],
    "qwen3_5_text": [
        QWEN3_5,
        QWEN3_5
        | {"attention_bias": True, "linear_num_key_heads": 1, "linear_num_value_heads": 3, "num_hidden_layers": 2},
        QWEN3_5 | {"layer_types": ["full_attention", "linear_attention", "linear_attention"], "hidden_act": "relu"},
        QWEN3_5
        | {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 2, "rms_norm_eps": 0.1}
        | {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 1},
    ],
    "qwen3_next": [
        QWEN_MOE | MANY,
        QWEN_MOE | SPARSE | {"attention_bias": True, "norm_topk_prob": False, "hidden_act": "relu"},
        QWEN_MOE
        | {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 2, "num_hidden_layers": 2}
        | {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 1},
    ],
}
