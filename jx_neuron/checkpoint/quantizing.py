"""Parameters that are quantized as they are read."""

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jx_neuron.checkpoint.weights import Source
from jx_neuron.nn.quantized import PARTS, Form


def quantized(source: Source, wide: Source, forms: Mapping[str, Form], dtype: np.dtype[Any]) -> Source:
    """`source`, with codes and scales in the place of the parameters of `forms`, for a model of `dtype`.

    wide: the same parameters in float32, of which codes are made.
    """
    parts = {f"{path}.{part}": (path, part) for path in forms for part in PARTS}
    locks, made = {path: Lock() for path in forms}, dict[str, np.ndarray]()

    def read(name: str) -> np.ndarray:
        if name not in parts:
            return source.read(name)
        path, part = parts[name]
        with locks[path]:  # scales are read after codes, and the matrix once
            if (scales := made.pop(name, None)) is not None:
                return scales
            arrays = forms[path].encode(wide.read(path), dtype)
            if part == "codes":
                made[f"{path}.scales"] = arrays["scales"]
        return arrays[part]

    def split(name: str) -> PartitionSpec:
        path, part = parts.get(name, (name, None))
        spec = source.split(path)
        return forms[path].partition(part, spec) if part else spec

    return replace(
        source,
        paths=[name for path in source.paths for name in ([f"{path}.{p}" for p in PARTS] if path in forms else [path])],
        read=read,
        split=split,
        name=lambda name: source.name(parts[name][0] if name in parts else name),
    )
