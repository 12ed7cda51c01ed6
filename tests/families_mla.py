"""Configs of decoders with latent attention: odd sizes, and every option of each."""

from typing import Any

from families_f1 import LLAMA

MLA = LLAMA | {
    "num_key_value_heads": None,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 22, "num_experts_per_tok": 3}
GROUPS = {"n_group": 4, "topk_group": 2}
# more experts than tokens choose, so that a decode step takes those alone
MANY = {"n_routed_experts": 64, "moe_intermediate_size": 9, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1}
MSCALE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 1.2,
    "original_max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "mscale_all_dim": 0.8}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "deepseek_v2": [
        MLA
        | ROUTED
        | GROUPS
        | {
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": MSCALE,
        },
        MLA | MANY | {"q_lora_rank": None, "kv_lora_rank": 14, "tie_word_embeddings": True, "rope_parameters": LINEAR},
        MLA | ROUTED | {"num_attention_heads": 6, "n_shared_experts": 1, "v_head_dim": 20, "hidden_act": "gelu"},
    ],
    "deepseek_v3": [
        MLA | ROUTED | GROUPS | {"first_k_dense_replace": 1, "rope_parameters": MSCALE},
        MLA
        | MANY
        | {
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
        MLA
        | ROUTED
        | {
            "n_group": 2,
            "topk_group": 1,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
            "qk_nope_head_dim": 3,
            "hidden_act": "gelu",
        },
    ],
}
