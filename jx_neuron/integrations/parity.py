"""Compares a decoder with its Hugging Face original, number by number.

This package's parity tests use it, and tests of your own decoder may:

    from jx_neuron.integrations.parity import parity
    result = parity(hf_model, tp_degree=4)
    assert result.worst < 1e-5, result.first_difference
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jx_neuron.checkpoint import weights
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.checkpoint.tokenizer import refuse_custom_code
from jx_neuron.errors import InputError
from jx_neuron.models import Decoder, text_model
from jx_neuron.nn.state import State, positions_of
from jx_neuron.runtime import xla
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelTensors", "Parity", "parity"]

_ROUNDING = 1e-4  # relative to the greatest magnitude; float32 in another order of summation stays well below


@dataclass(frozen=True)
class Parity:
    """Differences of the logits from HF's and, where they exceed rounding, of the hidden states.

    prefill:          the greatest absolute difference of logits over all tokens of all prompts.
    decode:           the greatest absolute difference of each decode step.
    first_difference: the place after which hidden states of the longest prompt first differ by more than rounding, such
                      as "layer 1, by 0.31 where HF's are up to 4.2"; None where the logits differ only by rounding.
    """

    prefill: float
    decode: tuple[float, ...]
    first_difference: str | None = None

    @property
    def worst(self) -> float:
        """The greatest difference of all."""
        return float(np.max([self.prefill, *self.decode]))


class ModelTensors:
    """The tensors of an HF model in memory, named as its checkpoints name them (`weights.Tensors`)."""

    def __init__(self, model: "PreTrainedModel"):
        from transformers.core_model_loading import revert_weight_conversion

        self._state = revert_weight_conversion(model, model.state_dict())

    def names(self) -> Iterable[str]:
        """The names of the tensors."""
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._state[name].shape)

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        return np.asarray(self._state[name].detach().float().cpu().numpy())


def parity(
    original: "PreTrainedModel | str | Path",
    *,
    model_type: str | None = None,
    tp_degree: int = 1,
    lengths: Sequence[int] = (12, 7, 1),
    steps: int = 8,
    chunk: int | None = None,
    seed: int = 0,
) -> Parity:
    """Runs a ragged, padded batch through the jitted step, and each of its rows by itself through HF, in float32.

    Prompts are random tokens, one prompt of each of `lengths`. Then both models get the same `steps` further random
    tokens, one at a time, so that differences do not change the sequences compared.

    Args:
        original: an HF causal language model in float32, or a checkpoint folder, which both HF and this package read.
        model_type: the registered decoder; by default the one that the config names.
        tp_degree: cores; on other platforms than a CPU, JAX needs as many devices.
        chunk: query tokens of a prefill call; by default the length of the longest prompt.

    Raises:
        ConfigError: the config is not supported.
        CheckpointError: the weight table does not fit the tensors.
        InputError: a length is below 1, or prompt and steps exceed the model's positions.
    """
    if isinstance(original, str | Path):
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        checkpoint = open_checkpoint(original)
        tensors: weights.Tensors = checkpoint
        with refuse_custom_code(original):
            if "text_config" in checkpoint.config:
                model = AutoModelForImageTextToText.from_pretrained(original, dtype="float32", trust_remote_code=False)
            else:
                model = AutoModelForCausalLM.from_pretrained(original, dtype="float32", trust_remote_code=False)
        original = model
    else:
        tensors = ModelTensors(original)
    raw = json.loads(original.config.to_json_string(use_diff=False))
    raw, tensors = text_model(raw | {"model_type": model_type or raw["model_type"]}, tensors)
    decoder = Decoder.from_config(raw, tp_degree)
    limit = decoder.config.max_positions
    if min(lengths) < 1 or (limit is not None and max(lengths) + steps > limit):
        raise InputError(
            f"lengths={tuple(lengths)} with steps={steps} should be from 1 token to {limit} positions in all"
        )
    rng = np.random.default_rng(seed)
    vocabulary = decoder.config.sizes["v"]
    sequences = [rng.integers(0, vocabulary, length + steps, dtype=np.int32) for length in lengths]
    expected = [_original_logits(original, sequence, steps) for sequence in sequences]
    source = decoder.source(tensors, np.float32)
    mesh = xla.mesh(decoder.tp_degree)
    runtime = xla.XlaRuntime(decoder, source, mesh, np.float32)
    prompts, following = _step_logits(runtime, sequences, steps, chunk or max(lengths))
    prefill = [
        _difference(jax_logits[:n], hf[:n]) for jax_logits, hf, n in zip(prompts, expected, lengths, strict=True)
    ]
    decode = [
        _difference(logits, np.stack([hf[n + i] for hf, n in zip(expected, lengths, strict=True)]))
        for i, logits in enumerate(following)
    ]
    result = Parity(float(np.max(prefill)), tuple(decode))
    if result.worst <= _ROUNDING * max(float(np.abs(hf).max()) for hf in expected):
        return result
    longest = int(np.argmax(lengths))
    prompt = sequences[longest][: lengths[longest]]
    return replace(result, first_difference=_first_difference(decoder, source, mesh, original, prompt))


def _first_difference(
    decoder: Decoder, source: weights.Source, mesh: Mesh, original: "PreTrainedModel", prompt: np.ndarray
) -> str:
    """The first of embeddings, layers and final norm after which the prompt's hidden states differ from HF's."""
    stages = ["the embeddings", *(f"layer {i}" for i in range(decoder.config.layers))]
    stages[-1] += " or what follows it (the final norm)"
    hidden, expected = _hidden_states(decoder, source, mesh, prompt), _original_hidden_states(original, prompt)
    for stage, jax_states, hf in zip(stages, hidden, expected, strict=True):
        if jax_states.shape != hf.shape:
            return f"{stage}, of shape {list(jax_states.shape)} where HF's is {list(hf.shape)}"
        scale = np.abs(hf).max()
        if not (difference := _difference(jax_states, hf)) <= _ROUNDING * scale:
            return f"{stage}, by {difference:.2g} where HF's are up to {scale:.2g}"
    return "no hidden state of the longest prompt: the logits of Model.logits, or the decode steps"


def _hidden_states(decoder: Decoder, source: weights.Source, mesh: Mesh, prompt: np.ndarray) -> list[np.ndarray]:
    """Hidden states [t, d] that enter each layer, then what Model.__call__ returns."""
    path = next(row.target.partition(".{i}.")[0] for row in decoder.table if ".{i}." in row.target).split(".")
    tokens = len(prompt)

    def run(params: weights.Params, state: State, tokens_bt: Array, length_b: Array) -> list[Array]:
        model: Any = decoder.bind(params)
        entering: list[Array] = []

        def recorded(layer: Any) -> Any:
            def call(x_btd: Array, *args: Any) -> Any:
                entering.append(x_btd)
                return layer(x_btd, *args)

            return call

        parent = reduce(getattr, path[:-1], model)
        vars(parent)[path[-1]] = _Blocks(map(recorded, getattr(parent, path[-1])))
        x_btd, _ = model(tokens_bt, state, positions_of(jnp.zeros_like(length_b), length_b, None, tokens, tokens))
        return [*entering, x_btd]

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
        decoder.abstract_state(1, tokens, np.float32, mesh),
    )
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        states = jax.jit(run)(source.place(mesh), zeros, prompt[None], np.array([tokens], np.int32))
    return [np.asarray(state)[0] for state in states]


class _Blocks(list[Any]):
    """Blocks that are no modules, in place of `Layers`."""

    def __call__(self, x_btd: Array, state: State, *args: Any) -> tuple[Array, State]:
        for layer, block in enumerate(self):
            x_btd, part = block(x_btd, state.of_layer(layer), *args)
            state = part.state
        return x_btd, state


def _original_hidden_states(model: Any, prompt: np.ndarray) -> list[np.ndarray]:
    """HF's hidden states: the input of each layer, then the output of the final norm."""
    import torch

    with torch.inference_mode():
        out = model(torch.from_numpy(prompt.astype(np.int64))[None], output_hidden_states=True)
    return [state[0].float().numpy() for state in out.hidden_states]


def _difference(actual: np.ndarray, hf: np.ndarray) -> float:
    return float(np.abs(actual - hf).max())


def _original_logits(model: Any, sequence: np.ndarray, steps: int) -> np.ndarray:
    """HF's logits [len(sequence), v]: the prompt in one call, then `steps` tokens one at a time over its cache."""
    import torch

    from jx_neuron.integrations.hf_generate import CACHE

    ids = torch.from_numpy(sequence.astype(np.int64))[None]
    prompt = len(sequence) - steps
    model.eval()
    with torch.inference_mode():
        model(ids[:, :1])  # resets HF's dynamic RoPE, which keeps the longest length of earlier calls until a short one
        out = model(ids[:, :prompt], use_cache=True)
        logits = [out.logits[0]]
        for i in range(prompt, len(sequence)):
            out = model(ids[:, i : i + 1], use_cache=True, **{CACHE: out[CACHE]})
            logits.append(out.logits[0])
        return np.asarray(torch.cat(logits).float().numpy())


def _step_logits(
    runtime: xla.XlaRuntime, sequences: Sequence[np.ndarray], steps: int, chunk: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of the padded prompts [b, t, v], and of each decode step [b, v]."""
    vocabulary = runtime.decoder.config.sizes["v"]
    batch, lengths = len(sequences), np.array([len(s) - steps for s in sequences], np.int32)
    one_b = np.ones(batch, np.int32)
    padded = -(-int(lengths.max()) // chunk) * chunk
    positions = max(padded, int(lengths.max()) + steps)
    tokens = np.zeros((batch, padded), np.int32)
    for row, sequence, length in zip(tokens, sequences, lengths, strict=True):
        row[:length] = sequence[:length]

    def logits(key: ProgramKey, tokens_bt: np.ndarray, start_b: np.ndarray, length_b: np.ndarray) -> np.ndarray:
        arrays = dict(tokens_bt=tokens_bt, start_b=start_b, length_b=length_b, slot_b=np.arange(batch, dtype=np.int32))
        output = runtime.run(StepInput(key, {name: arrays[name].astype(np.int32) for name in key.inputs()}))
        return np.asarray(output.logits)[..., :vocabulary]

    prefill, decode = ProgramKey("score", batch, chunk, positions), ProgramKey("decode", batch, 1, positions)
    prompts = [
        logits(prefill, tokens[:, start : start + chunk], np.full(batch, start), np.maximum(lengths - start, 0))
        for start in range(0, padded, chunk)
    ]
    following = [
        logits(decode, np.array([[s[n + i]] for s, n in zip(sequences, lengths, strict=True)]), lengths + i, one_b)
        for i in range(steps)
    ]
    return np.concatenate(prompts, axis=1), following
