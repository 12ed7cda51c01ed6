"""Decoders with rows of a test's own, and checkpoints of these."""

from types import SimpleNamespace

import numpy as np

from jx_neuron import register
from jx_neuron.checkpoint.weights import W
from jx_neuron.models import Decoder, llama

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
)


def made(model_type: str, config: type, model: type, rows: tuple[W, ...], **sizes: int) -> dict:
    """Registers a decoder, and gives a config.json of it."""
    register(model_type, SimpleNamespace(Config=config, Model=model, WEIGHTS=rows, IGNORE=llama.IGNORE))
    return {"model_type": model_type, **SIZES, **sizes}


def checkpoint(decoder: Decoder, without: str = "\0") -> dict[str, np.ndarray]:
    """Random tensors for the rows of one tensor each."""
    rng = np.random.default_rng(0)
    sizes = decoder.config.sizes
    named = [row for row in decoder.rows if not row.is_computed and not row.stacked and without not in row.name]
    return {row.name: rng.normal(size=row.source_shape(sizes)).astype(np.float32) for row in named}
