"""Configs of families with recurrent layers: odd sizes, and every option of each."""

from typing import Any

from families_f1 import LLAMA, SPECIAL, YARN

LFM2 = LLAMA | {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 8}
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

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lfm2": [
        LFM2 | {"conv_bias": True},
        LFM2 | {"conv_L_cache": 5, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
        LFM2 | {"full_attn_idxs": None, "layer_types": ["conv", "conv", "full_attention"], "norm_eps": 0.1},
        LFM2 | {"num_attention_heads": 6, "num_key_value_heads": 1, "full_attn_idxs": [2], "conv_L_cache": 2},
        LFM2 | {"block_ffn_dim_multiplier": 1.3, "full_attn_idxs": [0, 2], "rope_parameters": YARN},
    ],
    "mamba2": [
        MAMBA2 | {"n_groups": 2},
        MAMBA2 | {"use_bias": True, "conv_kernel": 3, "tie_word_embeddings": True, "layer_norm_epsilon": 0.1},
        MAMBA2 | {"n_groups": 8, "num_heads": 8, "head_dim": 12, "use_conv_bias": False, "hidden_act": "relu"},
        MAMBA2 | {"n_groups": 3, "expand": 3, "num_heads": 9, "num_hidden_layers": 3, "residual_in_fp32": False},
    ],
}
