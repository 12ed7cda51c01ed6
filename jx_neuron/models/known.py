"""The configs of the checkpoints that the first release of transformers-neuronx took, known by name without a network.

Fields and values as in the config.json of each on the Hugging Face Hub, of those that bear on the model.
"""

import os
from pathlib import Path
from typing import Any

from jx_neuron.checkpoint.folder import load_config

__all__ = ["KNOWN", "config_of"]


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> dict[str, Any]:
    return dict(
        model_type="gpt2",
        activation_function="gelu_new",
        bos_token_id=50256,
        eos_token_id=50256,
        layer_norm_epsilon=1e-5,
        n_embd=n_embd,
        n_head=n_head,
        n_layer=n_layer,
        n_positions=1024,
        vocab_size=50257,
    )


def _opt(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> dict[str, Any]:
    return dict(
        model_type="opt",
        activation_function="relu",
        bos_token_id=2,
        do_layer_norm_before=True,
        eos_token_id=2,
        ffn_dim=4 * hidden_size,
        hidden_size=hidden_size,
        max_position_embeddings=2048,
        num_attention_heads=num_attention_heads,
        num_hidden_layers=num_hidden_layers,
        pad_token_id=1,
        vocab_size=50272,
        word_embed_proj_dim=hidden_size,
    )


_GPT2 = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}

KNOWN: dict[str, dict[str, Any]] = {
    "EleutherAI/gpt-j-6B": dict(
        model_type="gptj",
        activation_function="gelu_new",
        bos_token_id=50256,
        eos_token_id=50256,
        layer_norm_epsilon=1e-5,
        n_embd=4096,
        n_head=16,
        n_layer=28,
        n_positions=2048,
        rotary_dim=64,
        tie_word_embeddings=False,
        vocab_size=50400,
    ),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
} | _GPT2
"""The eleven checkpoints by Hub id."""

_BY_NAME = {name.lower(): config for name, config in KNOWN.items()} | {
    f"openai-community/{name}": config for name, config in _GPT2.items()
}


def config_of(model: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """The parsed config of a checkpoint, without its weights: a path (a config.json, a folder, a .gguf file), one of
    `KNOWN` by name, or a Hub id. `options` are those of `jx_neuron.checkpoint.load_config`, and so are the errors.

    >>> config_of("openai-community/gpt2-xl")["n_head"]
    25
    """
    known = _BY_NAME.get(os.fspath(model).lower())
    if known is not None and not Path(model).exists() and not options.get("revision"):
        return dict(known)
    return load_config(model, **options)
