"""GGUF files of every architecture, against the HF models that are written so: tensors, configs and rotations."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from converted import Converter
from gguf_models import MODELS
from test_families import random_model

from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.checkpoint.gguf.architectures import ARCHITECTURES
from jx_neuron.models import Decoder
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.nn.positions import positions_of

# of which a file has other forms, and what follows from them is compared
FORMS = """attn_config global_head_dim head_dim layer_types n_inner no_rope_layers num_global_key_value_heads
original_max_position_embeddings per_layer_config rope_parameters rope_scaling rope_theta
partial_rotary_factor sliding_window sliding_window_pattern max_position_embeddings""".split()


def rotations(config: Any) -> dict[str, np.ndarray]:
    """Cosines and sines of 40 positions, by layer type."""
    if not isinstance(config, RopeConfig):
        return {}
    at = positions_of(jnp.zeros((1,), jnp.int32), jnp.full((1,), 40, jnp.int32), None, 40, 40)
    return {kind: np.stack(rope(at)) for kind, rope in config.ropes.items() if rope is not None}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param(name, options, id=f"{name}-{number}")
        for name, several in MODELS.items()
        for number, options in enumerate(several)
    ],
)
def test_files_are_hfs_models(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(model_type, options)
    model.save_pretrained(tmp_path / "hf")
    Converter(model, tmp_path / "m.gguf").write()
    folder, file = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "m.gguf")
    assert file.names() == folder.names()
    for name in folder.names():
        assert file.shape(name) == folder.shape(name)
        np.testing.assert_allclose(file.read(name), folder.read(name), rtol=0, atol=2e-7, err_msg=name)
    hf, ours = Decoder.from_config(folder.config), Decoder.from_config(file.config, tensors=file)
    assert sorted(ours.source(file, np.float32).paths) == sorted(hf.source(folder, np.float32).paths)
    for layer in (None, *range(hf.config.layers)):
        assert ours.config.sizes_of(layer) == hf.config.sizes_of(layer)
    assert list(ours.config.windows) == list(hf.config.windows)
    if type(ours.config) is type(hf.config):  # mistral's file is llama's
        for field in {field.name for field in dataclasses.fields(hf.config)} - set(FORMS):
            assert getattr(ours.config, field) == pytest.approx(getattr(hf.config, field)), field
    for kind, expected in rotations(hf.config).items():
        np.testing.assert_allclose(rotations(ours.config)[kind], expected, rtol=1e-5, atol=2e-5)


def test_every_architecture_is_here() -> None:
    made = {ARCHITECTURES[name].model_type for name in ARCHITECTURES}
    assert made - set(MODELS) == {"gptj"}  # which llama.cpp has no converter for
