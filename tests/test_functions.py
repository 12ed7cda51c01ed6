"""A model as pure functions: logits and gradients against HF's, and parameters that go back to it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from families import OPTIONS
from test_families import MAGNIFY, TOLERANCE, random_model

from jx_neuron import AutoModelForCausalLM, InputError, NeuronConfig, QuantizationConfig
from jx_neuron.errors import ArtifactError, ConfigError

FIRST = [pytest.param(name, options[0], id=name) for name, options in OPTIONS.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options"), FIRST)
def test_logits_are_hfs(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of whole prompts, in chunks, and of rows padded on either side."""
    hf = random_model(model_type, options)
    hf.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, n_positions=48)
    ids = np.random.default_rng(0).integers(0, hf.config.get_text_config().vocab_size, (2, 24))
    expected = tiny.logits(hf, ids)
    tolerance = (10 if model_type in MAGNIFY else 1) * TOLERANCE * np.abs(expected).max()
    params = model.params
    ours = jax.jit(model.apply)(params, ids)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)
    padded = np.zeros((2, 28), int)
    mask = np.zeros((2, 28), int)
    for row, first in enumerate((1, 4)):
        padded[row, first : first + 24], mask[row, first : first + 24] = ids[row], 1
    of_padded = np.asarray(model.apply(params, padded, mask))
    for row, first in enumerate((1, 4)):
        np.testing.assert_allclose(of_padded[row, first : first + 24], expected[row], rtol=0, atol=tolerance)
    step, state = jax.jit(model.step), model.init_state(2, 32)
    parts = []
    for start, end in ((0, 15), (15, 16), (16, 24)):
        logits_btv, state = step(params, state, ids[:, start:end], start)
        parts.append(logits_btv)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=tolerance)
    gradient = jax.grad(lambda params: loss(model, params, ids))(params)
    assert all(np.isfinite(array).all() for array in gradient.values())


def loss(model: Any, params: Any, ids: np.ndarray) -> jax.Array:
    """The mean cross-entropy of each token after the first."""
    likelihoods = jax.nn.log_softmax(model.apply(params, ids)[:, :-1])
    return -jnp.take_along_axis(likelihoods, jnp.asarray(ids)[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_gradients_are_torchs_and_parameters_go_back(name: str, tmp_path: Path) -> None:
    """A step of gradient descent here is one of torch on HF's model, by what save_pretrained writes of it."""
    hf, ids = tiny.model(name), tiny.prompts(2, 16)
    hf.save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before", n_positions=32)
    params = model.params
    value, gradient = jax.jit(jax.value_and_grad(lambda params: loss(model, params, ids)))(params)
    expected = hf(torch.tensor(ids), labels=torch.tensor(ids)).loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    model.params = jax.tree.map(lambda array, slope: array - 0.1 * slope, params, gradient)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.sub_(0.1 * parameter.grad)
    folder = model.save_pretrained(tmp_path / "after")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for path, tensor in hf.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[path], tensor, rtol=0, atol=1e-5)
    answer = model.generate(ids[0], max_new_tokens=8)
    assert [*ids[0], *answer.ids] == tiny.greedy(again, ids[:1], 24)[0].tolist()
    np.testing.assert_allclose(model.apply(model.params, ids), tiny.logits(again, ids), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_one_row_is_vmapped_and_donated_parameters_are_read_again(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.saved("llama", tmp_path), n_positions=32)
    params, ids = model.params, tiny.prompts(3, 8)
    every = model.apply(params, ids)
    rows = jax.vmap(model.apply, in_axes=(None, 0))(params, ids)
    np.testing.assert_allclose(rows, every, rtol=0, atol=1e-5)
    jax.jit(lambda params: jax.tree.map(jnp.negative, params), donate_argnums=0)(params)
    np.testing.assert_allclose(model.apply(model.params, ids), every, rtol=0, atol=1e-5)
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), model.params)
    assert float(jnp.abs(model.apply(half, ids) - every).max()) < 0.1 * float(jnp.abs(every).max())


def test_refused(tmp_path: Path) -> None:
    folder = tiny.saved("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, n_positions=32, backend="host")
    params = model.params
    with pytest.raises(InputError, match=r"params lacks 'norm.scale'"):
        model.params = {path: array for path, array in params.items() if path != "norm.scale"}
    with pytest.raises(InputError, match=r"params has 'other'"):
        model.apply({**params, "other": 1.0}, [[1]])
    with pytest.raises(InputError, match=r"params\['norm.scale'\] has shape \[3\]; the model has \[48\]"):
        model.apply({**params, "norm.scale": np.ones(3)}, [[1]])
    with pytest.raises(InputError, match="ids must be integers"):
        model.apply(params, [[1.5]])
    quantized = NeuronConfig(quant=QuantizationConfig.named("int8"))
    with pytest.raises(ConfigError, match="load it without quant"):
        _ = AutoModelForCausalLM.from_pretrained(folder, n_positions=32, neuron_config=quantized).params
    saved = model.save(tmp_path / "saved", sharded_weights=True)
    with pytest.raises(ArtifactError, match="from its checkpoint"):
        _ = AutoModelForCausalLM.from_pretrained(saved).params
