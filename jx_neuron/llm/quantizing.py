"""A checkpoint in 8 or 4 bits, in the compressed-tensors format, for Hugging Face transformers and vLLM too."""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.artifact import check_replaceable
from jx_neuron.artifact.folder import resolved
from jx_neuron.artifact.writing import writing
from jx_neuron.checkpoint.folder import CONFIG, GENERATION_CONFIG, PROCESSOR_FILES, Checkpoint, open_checkpoint
from jx_neuron.checkpoint.quantized import FIELD
from jx_neuron.checkpoint.quantized.codes import FLOATS
from jx_neuron.checkpoint.quantized.writing import Stored
from jx_neuron.checkpoint.row import W, tensors_of
from jx_neuron.checkpoint.safetensors_writing import write_safetensors
from jx_neuron.checkpoint.tensor_files import Array
from jx_neuron.checkpoint.writing import dtype_field, shard_name, with_architecture, write_index, write_json
from jx_neuron.config import QuantizationConfig
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.models import Decoder, text_model
from jx_neuron.models.wrapper import TextTensors
from jx_neuron.nn.quantizing import HEADS
from jx_neuron.util.durable import replacing, sync
from jx_neuron.util.progress import prefetch, track

SHARD = 2**30  # bytes of a file of weights, and of the tensors that wait for it
LEGAL = (
    "Legal are models whose layers are Linear, of matrices [outputs, inputs], and whose experts transformers reads "
    "from such matrices"
)
INSTEAD = "`--quant` of other commands quantizes the model as it is read"
IN_MEMORY = "model.language_model."  # a text model within HF's multimodal ones


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
    matrices, ignore = _choice(checkpoint)
    _check_groups(matrices, stored.group)
    key, dtype = _dtype(checkpoint, matrices)

    def parts(name: str) -> dict[str, Array]:
        array = checkpoint.read(name)
        if name not in matrices:
            return {name: np.asarray(array, order="C")}
        if not np.isfinite(array).all():
            raise CheckpointError(f"{checkpoint.path}: tensor {name} holds a NaN or an infinity, which has no code")
        affine = checkpoint.affine(name, stored.kind == "int4")
        split, *numbers = (matrices[name].split(each) for each in (array, *(affine or ())))
        return {
            matrix.removesuffix("weight") + part: found
            for matrix in split
            for part, found in stored.parts(split[matrix], dtype, tuple(each[matrix] for each in numbers)).items()
        }

    with writing(folder), replacing(folder) as fresh:
        names = list(checkpoint.tensors)
        tracked = zip(track(names, "quantizing", len(names)), prefetch(parts, names), strict=True)
        nbytes = _write_weights(fresh, (found for _, found in tracked))
        fields = {**with_architecture(checkpoint.config), key: dtype.name, FIELD: stored.config(ignore)}
        write_json(fresh / CONFIG, fields)
        if checkpoint.generation_config is not None:
            write_json(fresh / GENERATION_CONFIG, checkpoint.generation_config)
        for file in (*checkpoint.save_tokenizer(fresh), *_copy_processor(checkpoint.folder, fresh)):
            sync(file)
    return Written(folder, sum(each.count for each in matrices.values()), len(names) - len(matrices), nbytes)


@dataclass(frozen=True)
class Matrices:
    """The matrices [outputs, inputs] that a tensor is written as: itself, or one an expert.

    split: returns them by name, of the tensor or of as many scales or offsets.
    """

    count: int
    inputs: int
    split: Callable[[Array], Mapping[str, Array]]


def _choice(checkpoint: Checkpoint) -> tuple[Mapping[str, Matrices], list[str]]:
    """The tensors to quantize, and the modules that are not, by the names of HF's classes.

    A tensor that several parameters are parts of is quantized where all of them would be. Of a multimodal model the
    text model is quantized.

    Raises CheckpointError for a model whose layers have other tensors than compressed-tensors has for Linear.
    """
    config, tensors = text_model(checkpoint.config, checkpoint, alone=False)
    decoder = replace(Decoder.from_config(config, 1, tensors), quant=QuantizationConfig())
    theirs = tensors.theirs if isinstance(tensors, TextTensors) else {name: name for name in tensors.names()}
    of_tensor, names = defaultdict[str, list[W]](list), defaultdict[str, set[str]](set)
    for row in decoder.match(tensors):
        for name in row.names(row.sizes(decoder.config)):
            of_tensor[name].append(row)
    chosen = {name: rows for name, rows in of_tensor.items() if all(row.target in decoder.forms for row in rows)}
    if not chosen:
        raise CheckpointError(f"{checkpoint.path} has no matrix to quantize. {LEGAL}")
    for row in decoder.rows:  # a checkpoint of the base model lacks a prefix, and routers have two names
        names[row.target] |= set(row.names(row.sizes(decoder.config)))
    kept = {
        row.target for name, rows in of_tensor.items() if name not in chosen for row in rows if _is_matrix(row, decoder)
    }
    heads = {row.name for row in decoder.table if row.target == f"{HEADS[0]}.embedding"}
    ignore = {name.removesuffix(".weight") for name in heads.union(*(names[path] for path in kept))}
    if isinstance(tensors, TextTensors):
        ignore |= {IN_MEMORY + name.removeprefix("model.") for name in ignore if name.startswith("model.")}
        ignore |= {rf"re:(.+\.)?{re.escape(module)}\." for module in tensors.others}
    return {theirs[name]: _matrices(theirs[name], rows, decoder) for name, rows in chosen.items()}, sorted(ignore)


def _is_matrix(row: W, decoder: Decoder) -> bool:
    return row.name.endswith(".weight") and len(row.source_shape(row.sizes(decoder.config))) == 2


def _is_linear(row: W, decoder: Decoder) -> bool:
    form = decoder.forms[row.target]
    inputs = row.letters[form.lead : form.lead + form.inputs]
    return row.stacked in ("", "e") and _is_matrix(row, decoder) and row.last == inputs


def _matrices(name: str, rows: Sequence[W], decoder: Decoder) -> Matrices:
    """The matrices of tensor `name`, from which `rows` take parameters."""
    if all(_is_linear(row, decoder) for row in rows):
        (_, inputs) = rows[0].source_shape(rows[0].sizes(decoder.config))
        return Matrices(1, inputs, lambda array: {name: array})
    sizes = rows[0].sizes(decoder.config)
    pairs = [(row, _of_each_expert(name, row, decoder)) for row in rows]

    def split(array: Array) -> dict[str, Array]:
        return {
            matrix: part
            for row, own in pairs
            for matrix, part in tensors_of([own], [row.laid_out([array], sizes)], decoder.config).items()
        }

    return Matrices(len(pairs) * sizes["e"], pairs[0][1].source_shape(sizes)[1], split)


def _of_each_expert(name: str, row: W, decoder: Decoder) -> W:
    """The row by which a parameter is read from a matrix for each expert, in place of `row`, whose tensor `name` has
    all experts. Raises CheckpointError where there is none."""
    rows = [each for each in decoder.rows if each.target == row.target]
    own = next((each for each in rows if each.stacked and _is_linear(each, decoder)), None)
    if own is None:
        is_conv = row.has_inputs_first and len(row.source_shape(row.sizes(decoder.config))) == 2
        raise CheckpointError(
            f"{name} of {decoder.model_type} is {'a Conv1D' if is_conv else 'not a matrix of Linear'}, laid out "
            f"{row.layout!r}, and transformers reads compressed-tensors into Linear alone. {LEGAL}. {INSTEAD}"
        )
    of_layer = f".{row.layer}."
    suffixes = (each.name.partition(of_layer)[2] for each in (row, own))
    return replace(own, source=name.removesuffix(next(suffixes)) + next(suffixes))


def _check_groups(matrices: Mapping[str, Matrices], group: int | None) -> None:
    """Raises ConfigError for a group size that does not divide the inputs of each matrix."""
    inputs = {name: each.inputs for name, each in sorted(matrices.items())}
    if cut := next((name for name, size in inputs.items() if group and size % group), None):
        raise ConfigError(
            f"group_size={group} does not divide the {inputs[cut]} inputs of {cut}; legal are even divisors of "
            f"{gcd(*inputs.values())}"
        )


def _dtype(checkpoint: Checkpoint, chosen: Iterable[str]) -> tuple[str, np.dtype[Any]]:
    """The dtype of the model, which is that of scales, and the field of config.json that says it."""
    legal = {dtype.name: dtype for dtype in FLOATS}
    key = dtype_field(checkpoint.config)
    said = str(checkpoint.config.get(key)).removeprefix("torch.")
    return key, legal.get(said) or legal.get(checkpoint.dtype(min(chosen)), FLOATS[0])


def _copy_processor(folder: Path, into: Path) -> list[Path]:
    """Copies the files of a multimodal model's processor besides those of its tokenizer, and returns the copies."""
    files = [folder / name for name in PROCESSOR_FILES]
    return [Path(shutil.copy(file, into / file.name)) for file in files if file.is_file()]


def _write_weights(folder: Path, tensors: Iterable[Mapping[str, Array]]) -> int:
    """Writes files of weights, with an index where there are several, and returns the bytes of all tensors."""
    shards, waiting = list[list[str]](), dict[str, Array]()
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
