"""Logits that are not finite end an answer with an error that names the tensor at fault, and leave the model usable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jx_neuron import HuggingFaceGenerationModelAdapter, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.errors import NonFiniteError
from jx_neuron.nn.sampling import NOT_FINITE, Sampling, greedy, sample
from jx_neuron.nn.sharding import mesh

PROMPT = np.array([[5, 6, 7, 8, 9]])
TENSORS = [
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def saved(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tiny.saved("llama", folder, tiny.tokenizer())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def opened(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(
        folder,
        n_positions=32,
        context_length_estimate=8,
        neuron_config=NeuronConfig(output_all_logits=True),
        **options,
    )


def hf_generate(model: NeuronAutoModelForCausalLM) -> None:
    config = transformers.LlamaConfig(**model.config)
    HuggingFaceGenerationModelAdapter(config, model).generate(
        torch.tensor(PROMPT), attention_mask=torch.ones(1, 5), max_length=9, do_sample=False
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: model.sample(PROMPT, 9, top_k=1),
    "drawn": lambda model: model.sample(PROMPT, 9, top_k=20, seed=0),
    "on the host": lambda model: model.sample(PROMPT, 9, repetition_penalty=1.1, seed=0),
    "stream": lambda model: list(model.stream(PROMPT, 9, logprobs=2)),
    "generate": hf_generate,
    "score": lambda model: model.score("%&'()"),
    "logits": lambda model: model(PROMPT),
    "prefix": lambda model: model.keep_prefix(PROMPT[0]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", TENSORS)
def test_the_tensor_at_fault_is_named(name: str, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[7 * 48 if name == "model.embed_tokens.weight" else 3] = np.nan

    model = opened(saved(tmp_path, spoil))
    with pytest.raises(NonFiniteError, match=rf"logits of row 0 .* tensor {name}: load a sound checkpoint"):
        model.sample(PROMPT, 9, top_k=1)


@pytest.mark.few(2)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("backend", "tp_degree"), [("xla", 1), ("xla", 2), ("host", 2)])
def test_every_way_of_asking_ends_so(backend: str, tp_degree: int, value: float, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"][90, 2] = value  # one logit of 101, in the second core's part

    model = opened(saved(tmp_path, spoil), backend=backend, tp_degree=tp_degree)
    for name, call in CALLS.items():
        with pytest.raises(NonFiniteError, match=r"tensor lm_head\.weight"):
            pytest.fail(f"{name} gave {call(model)}")


@pytest.mark.parametrize("backend", ["xla", pytest.param("host", marks=pytest.mark.slow)])
def test_overflow_in_float16_says_so_and_the_model_goes_on(backend: str, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.embed_tokens.weight"][7] = 6e4  # float16 ends at 65504: what attention adds to it goes beyond
        tensors["model.layers.0.self_attn.o_proj.weight"] *= 2e3

    folder = saved(tmp_path, enlarge)
    model = opened(folder, backend=backend, amp="f16", batch_size=2)
    fine = np.array([[5, 6], [9, 10]])
    alone = opened(folder, backend=backend, amp="f16", batch_size=2).sample(fine, 24, top_k=1, seed=0)
    for call in CALLS.values():
        with pytest.raises(NonFiniteError, match=r"no tensor of the model does.*amp='bf16' or 'f32'"):
            call(model)
        np.testing.assert_array_equal(model.sample(fine, 24, top_k=1, seed=0), alone)
    with pytest.raises(NonFiniteError, match="logits of row 1 "):
        model.sample(np.array([[5, 6], [5, 7]]), 9)


def test_a_number_beyond_the_dtype_is_the_tensors(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] = 1e6

    folder = saved(tmp_path, enlarge)
    assert np.isfinite(opened(folder)(PROMPT)).all()
    with pytest.raises(NonFiniteError, match=r"tensor model\.norm\.weight"):
        opened(folder, amp="f16").sample(PROMPT, 9)


def test_a_saved_model_says_so_too(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] = np.nan

    artifact = opened(saved(tmp_path / "hf", spoil), backend="host").save(tmp_path / "saved", sharded_weights=True)
    with pytest.raises(NonFiniteError, match=r"tensor norm\.scale"):
        NeuronAutoModelForCausalLM.from_pretrained(artifact).sample(PROMPT, 9)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_sampler_marks_rows_that_are_not_finite(shards: int, dtype: Any) -> None:
    import jax

    logits_bv = np.random.default_rng(0).normal(size=(7, 32)).astype(dtype)
    finite = [0, 4, 6]
    for row, value in ((1, np.nan), (2, np.inf), (3, -np.inf), (5, np.nan)):
        logits_bv[row, 5 * row % 32] = value
    logits_bv[6] = np.finfo(np.float32).min if dtype is np.float32 else -1e30
    one_b = jnp.ones(7, jnp.float32)
    by = Sampling(one_b, jnp.zeros(7, jnp.int32), one_b, one_b / 2)
    with jax.set_mesh(mesh(shards)):
        for tokens in (
            jax.jit(greedy, static_argnums=1)(logits_bv, shards),
            jax.jit(sample, static_argnums=(2, 3))(logits_bv, by, 8, shards),
        ):
            np.testing.assert_array_equal(np.asarray(tokens) != NOT_FINITE, np.isin(np.arange(7), finite))
