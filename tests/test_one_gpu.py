"""A model on one GPU: what its programs compute, on any device, and against HF's where JAX has a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from steps import step_input

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.checkpoint.weights import from_params
from jx_neuron.integrations.parity import parity
from jx_neuron.models import Decoder
from jx_neuron.nn import sharding
from jx_neuron.runtime import xla
from jx_neuron.runtime.gpu import OneGPU
from jx_neuron.runtime.sharded import Sharded
from jx_neuron.step.program_key import ProgramKey


def config(family: str) -> dict:
    return tiny.CONFIGS[family]().to_dict()


def placed(kind, decoder, dtype):
    rng = np.random.default_rng(0)
    values = {path: rng.normal(0, 0.3, of.shape) for path, of in decoder.abstract_params("float32").items()}
    mesh = sharding.mesh(1)
    return kind(decoder, from_params(values, decoder.rows, decoder.padding, jnp.dtype(dtype)), mesh, jnp.dtype(dtype))


def answer(of, inputs):
    """Logits of a step over an empty state table, and its dots."""
    key, arrays = inputs.key, inputs.arrays.values()
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of.state(key.rows, key.positions, verifies=False))
    traced = jax.jit(of.step(key)).trace(of.params(key), empty, *arrays)
    dots = [eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name == "dot_general"]
    _, logits, _ = traced.lower().compile()(of.params(key), empty, *arrays)
    return np.asarray(logits), dots


USUAL = {("gpt2", "float32"), ("llama", "bfloat16")}


def equations(jaxpr):
    """Those of `jaxpr` and of what it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=[] if (family, dtype) in USUAL else pytest.mark.slow)
        for family in tiny.CONFIGS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_what_a_gpu_computes_is_what_several_devices_do(family, dtype) -> None:
    decoder, rng = Decoder.from_config(config(family)), np.random.default_rng(1)
    gpu, several = (placed(kind, decoder, dtype) for kind in (OneGPU, Sharded))
    of_state = 4  # queries meet keys, and weights values, in each of two layers
    for batch, tokens in ((1, 1), (2, 1), (1, 5)):
        key = ProgramKey("decode" if tokens == 1 else "prefill", batch, tokens, 16)
        inputs = step_input(key, rng.integers(0, tiny.VOCAB, (batch, tokens)))
        (found, dots), (expected, all_dots) = (answer(of, inputs) for of in (gpu, several))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if dtype == "float32" else 0.05 * expected.std())
        assert len(all_dots) >= of_state + 9
        # one row: sums; the head of a prompt takes its last token alone
        assert len(dots) == {(1, 1): of_state, (2, 1): len(all_dots), (1, 5): len(all_dots) - 1}[batch, tokens]


def test_a_gpu_holds_kernels_as_checkpoints_do() -> None:
    params = placed(OneGPU, Decoder.from_config(config("llama")), "float32").params(ProgramKey("decode", 1, 1, 16))
    assert params["layers.0.mlp.gate_up.up_proj.kernel"].array.shape == (90, 48)
    assert params["layers.1.self_attn.qkv.k_proj.kernel"].array.shape == (2, 12, 48)
    assert params["layers.1.self_attn.o_proj.kernel"].array.shape == (48, 4, 12)
    assert params["lm_head.embedding"].shape == (101, 48)


@pytest.fixture
def gpu() -> jax.Device:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU here: {error}")


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("lengths", [(12, 7, 1), (9,)], ids=str)
def test_float32_on_a_gpu_is_hf_s(gpu, family, lengths) -> None:
    model = tiny.model(family)
    worst = parity(model, lengths=lengths).worst
    scale = np.abs(tiny.logits(model, tiny.prompts(1, 12))).max()
    assert worst < 1e-4 * max(1, scale)


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_gpu_and_a_cpu_draw_the_same_tokens(gpu, family, rows, tmp_path, monkeypatch) -> None:
    folder, found = tiny.saved(family, tmp_path), []
    for device in (gpu, jax.devices("cpu")[0]):
        monkeypatch.setattr(xla, "mesh", partial(sharding.mesh, devices=[device]))
        model = NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=rows, n_positions=64)
        model.to_neuron()
        ids = tiny.prompts(rows, 9)
        found.append(
            [model.sample(ids, 40, top_k=1), model.sample(ids, 40, top_k=20, top_p=0.9, temperature=1.3, seed=5)]
        )
    for on_gpu, on_cpu in zip(*found, strict=True):
        np.testing.assert_array_equal(on_gpu, on_cpu)
