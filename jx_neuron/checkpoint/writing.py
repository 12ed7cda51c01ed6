"""Checkpoints as Hugging Face writes them: config.json, and safetensors with an index where there are several files."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.row import W, tensors_of
from jx_neuron.checkpoint.safetensors_writing import write_safetensors
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integer, shown
from jx_neuron.util.durable import sync
from jx_neuron.util.progress import bar

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class HFTensors:
    """A model's parameters as HF's tensors.

    layouts: the dtype and the shape of each tensor, by HF's name, in the order in which reading is fastest.
    read:    returns a tensor. Each is read once: tensors of one parameter are made together, and kept until then.
    """

    layouts: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], np.ndarray]


def hf_tensors(
    rows: Iterable[W], config: HFConfig, read: Callable[[str], np.ndarray], dtype: np.dtype[Any]
) -> HFTensors:
    """The tensors that `rows` read the parameters of a model of `dtype` from.

    rows: all rows of each tensor. Computed parameters have no tensor.
    read: returns a parameter, unpadded, by path.
    """
    groups = defaultdict[str, list[W]](list)
    for row in rows:
        if not row.is_computed:
            groups[row.name].append(row)
    group_of = {name: group for group in groups.values() for name in group[0].names(group[0].sizes(config))}
    made: dict[str, np.ndarray] = {}

    def tensor(name: str) -> np.ndarray:
        if name not in made:
            group = group_of[name]
            made.update(tensors_of(group, [read(row.target) for row in group], config))
        return made.pop(name)

    def layout(row: W) -> tuple[str, tuple[int, ...]]:
        return row.dtype(dtype).name, row.source_shape(row.sizes(config))

    return HFTensors({name: layout(group_of[name][0]) for name in sorted(group_of)}, tensor)


def write_tensors(folder: Path, tensors: HFTensors, shard_size: int) -> None:
    """Writes files of at most `shard_size` bytes each, or one tensor, and an index where there are several."""
    shards, size = list[list[str]]([[]]), 0
    for name, (dtype, shape) in tensors.layouts.items():
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        if shards[-1] and size + nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    with bar() as progress:
        task = progress.add_task("writing weights", total=len(tensors.layouts))

        def part(name: str) -> list[np.ndarray]:
            progress.advance(task)
            return [np.asarray(tensors.read(name), order="C")]

        for number, names in enumerate(shards):
            path = folder / shard_name(number, len(shards))
            with path.open("wb") as file:
                write_safetensors([file], {name: tensors.layouts[name] for name in names}, part, {"format": "pt"})
            sync(path)
    if len(shards) > 1:
        total = sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape in tensors.layouts.values())
        write_index(folder, shards, total)


def shard_name(number: int, count: int) -> str:
    """The file of a shard, counted from 0, of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Iterable[str]], total: int) -> None:
    """Writes the index of files that hold the tensors named in `shards`, of `total` bytes."""
    places = {name: shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes a file of JSON."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    sync(path)


def with_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the name of HF's class, which vLLM needs and a GGUF file does not have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])
    return {**({"architectures": [name]} if name else {}), **config}


def dtype_field(config: Mapping[str, Any]) -> str:
    """The field of a config that says its dtype."""
    return "torch_dtype" if "torch_dtype" in config else "dtype"


def byte_size(name: str, value: Any) -> int:
    """A number of bytes, written as one or as "5GB". Raises InputError that names it for anything else."""
    if isinstance(value, str):
        if (match := re.fullmatch(r"(\d{1,9})([KMGT]B)", value)) is None or not int(match[1]):
            raise InputError(f"{name}={shown(value)} is not legal; it takes bytes, or a text such as '5GB' or '200MB'")
        return int(match[1]) * UNITS[match[2]]
    return integer(name, value)
