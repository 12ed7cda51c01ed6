"""Holding a decoder against its Hugging Face original, number by number.

The parity tests of this package use it, and so may those of a decoder of one's own:

    from jx_neuron.testing import parity
    assert parity(hf_model, tp_degree=4).worst < 1e-5
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jx_neuron import weights
from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.errors import InputError
from jx_neuron.lowering.shape import Shape
from jx_neuron.models import Decoder
from jx_neuron.runtime import xla

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelTensors", "Parity", "parity"]


@dataclass(frozen=True)
class Parity:
    """The greatest absolute differences of logits: over all tokens of all prompts, and at each decode step."""

    prefill: float
    decode: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The greatest of all."""
        return float(np.max([self.prefill, *self.decode]))


class ModelTensors:
    """The tensors of a torch module, as a checkpoint offers them (`weights.Tensors`)."""

    def __init__(self, model: Any):
        self._state = model.state_dict()

    def names(self) -> Iterable[str]:
        """Of every tensor."""
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """HF's."""
        return tuple(self._state[name].shape)

    def read(self, name: str) -> np.ndarray:
        """In float32."""
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
    """Runs one ragged, padded batch through the jitted step and each of its rows alone through HF, in float32.

    Prompts are random tokens, one of each of `lengths`; then `steps` further random tokens are given to both, one at
    a time, so that every step is compared on the same sequence whatever the differences before it.

    Args:
        original: an HF causal language model in float32, or a checkpoint folder, which HF and we each read.
        model_type: the registered decoder; by default the one that the config names.
        tp_degree: cores; beyond a CPU, as many JAX devices are needed.
        chunk: query tokens of a prefill call; by default the longest prompt, in one.

    Raises:
        ConfigError: the config is not supported.
        CheckpointError: the weight table does not fit the tensors.
        InputError: a length is below 1, or prompt and steps exceed the model's positions.
    """
    if isinstance(original, str | Path):
        from transformers import AutoModelForCausalLM

        tensors: weights.Tensors = open_checkpoint(original)
        original = AutoModelForCausalLM.from_pretrained(original, dtype="float32")
    else:
        tensors = ModelTensors(original)
    raw = json.loads(original.config.to_json_string(use_diff=False))
    decoder = Decoder.from_config(raw | {"model_type": model_type or raw["model_type"]}, tp_degree)
    limit = decoder.config.max_positions
    if min(lengths) < 1 or (limit is not None and max(lengths) + steps > limit):
        raise InputError(
            f"lengths={tuple(lengths)} with steps={steps} should be from 1 token to {limit} positions in all"
        )
    rng = np.random.default_rng(seed)
    vocabulary = decoder.config.sizes["v"]
    sequences = [rng.integers(0, vocabulary, length + steps, dtype=np.int32) for length in lengths]
    expected = [_original_logits(original, sequence, steps) for sequence in sequences]
    prompts, following = _step_logits(decoder, tensors, sequences, steps, chunk or max(lengths))
    prefill = [_difference(ours[:n], hf[:n]) for ours, hf, n in zip(prompts, expected, lengths, strict=True)]
    decode = [
        _difference(logits, np.stack([hf[n + i] for hf, n in zip(expected, lengths, strict=True)]))
        for i, logits in enumerate(following)
    ]
    return Parity(float(np.max(prefill)), tuple(decode))


def _difference(ours: np.ndarray, hf: np.ndarray) -> float:
    return float(np.abs(ours - hf).max())


def _original_logits(model: Any, sequence: np.ndarray, steps: int) -> np.ndarray:
    """HF's logits [len(sequence), v]: the prompt in one call, then `steps` tokens one at a time over its cache."""
    import torch

    from jx_neuron.generation.hf import CACHE

    ids = torch.from_numpy(sequence.astype(np.int64))[None]
    prompt = len(sequence) - steps
    model.eval()
    with torch.inference_mode():
        model(ids[:, :1])  # HF's dynamic RoPE remembers the longest sequence of the calls before, until a short one
        out = model(ids[:, :prompt], use_cache=True)
        logits = [out.logits[0]]
        for i in range(prompt, len(sequence)):
            out = model(ids[:, i : i + 1], use_cache=True, **{CACHE: out[CACHE]})
            logits.append(out.logits[0])
        return np.asarray(torch.cat(logits).float().numpy())


def _step_logits(
    decoder: Decoder, tensors: weights.Tensors, sequences: Sequence[np.ndarray], steps: int, chunk: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of the padded prompts [b, t, v], and of each decode step [b, v]."""
    vocabulary = decoder.config.sizes["v"]
    rows = weights.match(decoder.table, decoder.ignore, decoder.shapes, decoder.config.layers, decoder.padding, tensors)
    source = weights.from_checkpoint(rows, decoder.padding, tensors, np.dtype(np.float32))
    runtime = xla.XlaRuntime(decoder, source, xla.mesh(decoder.tp_degree), np.float32)
    batch, lengths = len(sequences), np.array([len(s) - steps for s in sequences], np.int32)
    one_b = np.ones(batch, np.int32)
    padded = -(-int(lengths.max()) // chunk) * chunk
    slots = max(padded, int(lengths.max()) + steps)
    tokens = np.zeros((batch, padded), np.int32)
    for row, sequence, length in zip(tokens, sequences, lengths, strict=True):
        row[:length] = sequence[:length]

    def logits(shape: Shape, tokens_bt: np.ndarray, start_b: np.ndarray, length_b: np.ndarray) -> np.ndarray:
        found = runtime.run(shape, {"tokens_bt": tokens_bt, "start_b": start_b, "length_b": length_b}).logits_bv
        return np.asarray(found)[..., :vocabulary]

    prefill, decode = Shape(batch, chunk, slots, all_logits=True), Shape(batch, 1, slots)
    prompts = [
        logits(prefill, tokens[:, start : start + chunk], np.full(batch, start, np.int32), lengths - start)
        for start in range(0, padded, chunk)
    ]
    following = [
        logits(decode, np.array([[s[n + i]] for s, n in zip(sequences, lengths, strict=True)]), lengths + i, one_b)
        for i in range(steps)
    ]
    return np.concatenate(prompts, axis=1), following
