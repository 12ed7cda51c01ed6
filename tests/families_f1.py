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

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20, "attention_bias": True},
    ],
}
