"""A checkpoint in 8 or 4 bits, in the compressed-tensors format, for Hugging Face transformers and vLLM too."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.artifact import check_replaceable
from jx_neuron.artifact.folder import resolved
from jx_neuron.artifact.writing import writing
from jx_neuron.checkpoint.folder import CONFIG, GENERATION_CONFIG, Checkpoint, open_checkpoint
from jx_neuron.checkpoint.quantized import FIELD
from jx_neuron.checkpoint.quantized.codes import FLOATS
from jx_neuron.checkpoint.quantized.writing import Stored
from jx_neuron.checkpoint.row import W
from jx_neuron.checkpoint.safetensors_writing import write_safetensors
from jx_neuron.checkpoint.writing import dtype_field, shard_name, with_architecture, write_index, write_json
from jx_neuron.config import QuantizationConfig
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.models import Decoder
from jx_neuron.nn.quantized import Form
from jx_neuron.nn.quantizing import HEADS
from jx_neuron.util.durable import replacing, sync
from jx_neuron.util.progress import prefetch, track

SHARD = 2**30  # bytes of a file of weights, and of the tensors that wait for it
LEGAL = (
    "Legal are models whose layers and experts are matrices [outputs, inputs], one a tensor, as Hugging Face's Linear "
    "has them"
)


@dataclass(frozen=True)
class Written:
    """The written folder, the number of quantized matrices and of other tensors, and the bytes of all."""

    folder: Path
    quantized: int
    kept: int
    nbytes: int


def quantize(
    model: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    quant: str = "int8",
    group_size: int | None = None,
    w8a8: bool = False,
    revision: str | None = None,
) -> Written:
    """Writes `model` into a new folder, with the matrices of its layers in the compressed-tensors format.

    The tensors are read one at a time. The folder is whole or absent, whenever the process ends.

    model, revision: as open_checkpoint takes them.
    quant:           "int8" or "fp8", with a scale an output channel, or "int4", with one for each `group_size` inputs.
    w8a8:            whether the config tells other programs to round activations to 8 bits too, a scale a token; of
                     int8 and fp8.

    Raises ConfigError for options that are not legal, CheckpointError for a model that cannot be stored so, and
    ArtifactError for a folder that is not empty or cannot be written.
    """
    folder = resolved(Path(directory))
    named = QuantizationConfig.named(quant)
    config = named if group_size is None else replace(named, group_size=group_size)
    stored = Stored(config.kind, config.group_size, w8a8)
    if w8a8 and stored.group:
        raise ConfigError(f"w8a8, 8 bits for weights and activations, goes with quant='int8' or 'fp8', not {quant!r}")
    check_replaceable(folder, overwrite=False)
    checkpoint = open_checkpoint(model, revision=revision)
    chosen, ignore = _choice(checkpoint)
    _check_groups(chosen, checkpoint, stored.group)
    key, dtype = _dtype(checkpoint, chosen)

    def parts(name: str) -> dict[str, np.ndarray]:
        array = checkpoint.read(name)
        if name not in chosen:
            return {name: np.asarray(array, order="C")}
        if not np.isfinite(array).all():
            raise CheckpointError(f"{checkpoint.path}: tensor {name} holds a NaN or an infinity, which has no code")
        module = name.removesuffix("weight")
        return {
            module + part: found
            for part, found in stored.parts(array, dtype, checkpoint.affine(name, stored.kind == "int4")).items()
        }

    with writing(folder), replacing(folder) as fresh:
        names = list(checkpoint.tensors)
        tracked = zip(track(names, "quantizing", len(names)), prefetch(parts, names), strict=True)
        nbytes = _write_weights(fresh, (found for _, found in tracked))
        fields = {**with_architecture(checkpoint.config), key: dtype.name, FIELD: stored.config(ignore)}
        write_json(fresh / CONFIG, fields)
        if checkpoint.generation_config is not None:
            write_json(fresh / GENERATION_CONFIG, checkpoint.generation_config)
        for file in checkpoint.save_tokenizer(fresh):
            sync(file)
    return Written(folder, len(chosen), len(names) - len(chosen), nbytes)


def _choice(checkpoint: Checkpoint) -> tuple[frozenset[str], list[str]]:
    """The tensors to quantize, and the modules that are not, by the names of HF's classes for causal models.

    A tensor that several parameters are parts of is quantized where all of them would be.

    Raises CheckpointError for a model whose layers have other tensors than compressed-tensors has for Linear.
    """
    raw = checkpoint.config
    if "text_config" in raw:
        raise CheckpointError(f"{checkpoint.path} is multimodal (config.json has a text_config). {LEGAL}")
    decoder = replace(Decoder.from_config(raw, 1, checkpoint), quant=QuantizationConfig())
    of_tensor, names = defaultdict[str, list[W]](list), defaultdict[str, set[str]](set)
    for row in decoder.match(checkpoint):
        if row.target in decoder.forms:
            _check_linear(row, decoder.forms[row.target], decoder)
        for name in row.names(row.sizes(decoder.config)):
            of_tensor[name].append(row)
    chosen = {name for name, parts in of_tensor.items() if all(row.target in decoder.forms for row in parts)}
    if not chosen:
        raise CheckpointError(f"{checkpoint.path} has no matrix to quantize. {LEGAL}")
    for row in decoder.rows:  # a checkpoint of the base model lacks a prefix, and routers have two names
        names[row.target] |= set(row.names(row.sizes(decoder.config)))
    kept = {
        row.target
        for name, parts in of_tensor.items()
        if name not in chosen
        for row in parts
        if _is_matrix(row, decoder)
    }
    heads = {row.name for row in decoder.table if row.target == f"{HEADS[0]}.embedding"}
    return frozenset(chosen), sorted(
        name.removesuffix(".weight") for name in heads.union(*(names[path] for path in kept))
    )


def _is_matrix(row: W, decoder: Decoder) -> bool:
    return row.name.endswith(".weight") and len(row.source_shape(row.sizes(decoder.config))) == 2


def _check_linear(row: W, form: Form, decoder: Decoder) -> None:
    inputs = row.letters[form.lead : form.lead + form.inputs]
    if row.stacked not in ("", "e") or not _is_matrix(row, decoder) or row.last != inputs:
        raise CheckpointError(
            f"{row.name} of {decoder.model_type} is laid out {row.layout!r}, and compressed-tensors has "
            f"[outputs, inputs] alone. {LEGAL}. `--quant` of other commands quantizes it as it is read"
        )


def _check_groups(chosen: Iterable[str], checkpoint: Checkpoint, group: int | None) -> None:
    """Raises ConfigError for a group size that does not divide the inputs of each matrix."""
    columns = {name: checkpoint.shape(name)[1] for name in sorted(chosen)}
    if cut := next((name for name, size in columns.items() if group and size % group), None):
        raise ConfigError(
            f"group_size={group} does not divide the {columns[cut]} inputs of {cut}; legal are even divisors of "
            f"{reduce(gcd, columns.values())}"
        )


def _dtype(checkpoint: Checkpoint, chosen: frozenset[str]) -> tuple[str, np.dtype[Any]]:
    """The dtype of the model, which is that of scales, and the field of config.json that says it."""
    legal = {dtype.name: dtype for dtype in FLOATS}
    key = dtype_field(checkpoint.config)
    said = str(checkpoint.config.get(key)).removeprefix("torch.")
    return key, legal.get(said) or legal.get(checkpoint.dtype(min(chosen)), FLOATS[0])


def _write_weights(folder: Path, tensors: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Writes files of weights, with an index where there are several, and returns the bytes of all tensors."""
    shards, waiting = list[list[str]](), dict[str, np.ndarray]()
    size = total = 0

    def flush() -> None:
        path = folder / f"{len(shards)}.safetensors"
        layouts = {name: (array.dtype.name, array.shape) for name, array in waiting.items()}
        with path.open("wb") as file:
            write_safetensors([file], layouts, lambda name: [waiting.pop(name)], {"format": "pt"})
        sync(path)
        shards.append(list(layouts))

    for parts in tensors:
        nbytes = sum(array.nbytes for array in parts.values())
        if waiting and size + nbytes > SHARD:
            flush()
            size = 0
        waiting |= parts
        size, total = size + nbytes, total + nbytes
    flush()
    _name_shards(folder, shards, total)
    return total


def _name_shards(folder: Path, shards: Sequence[Sequence[str]], total: int) -> None:
    for number in range(len(shards)):
        (folder / f"{number}.safetensors").rename(folder / shard_name(number, len(shards)))
    if len(shards) > 1:
        write_index(folder, shards, total)
