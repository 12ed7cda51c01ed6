"""Parameters that are quantized as they are read."""

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jx_neuron.checkpoint.weights import Source
from jx_neuron.nn.quantized import Form


def quantized(source: Source, wide: Source, forms: Mapping[str, Form], dtype: np.dtype[Any]) -> Source:
    """`source`, with codes, scales and offsets in the place of the parameters of `forms`, for a model of `dtype`.

    wide: the same parameters in float32, of which codes are made; stored codes are kept where the form has them.
    """
    parts = {f"{path}.{part}": (path, part) for path, form in forms.items() for part in form.parts}

    def encoded(path: str) -> dict[str, np.ndarray]:
        form = forms[path]
        stored = wide.affine(path, form.kind == "int4")
        if stored is not None or not form.rows or wide.slices is None:
            return form.encode(wide.read(path), dtype, stored)
        parts = [form.encode(part, dtype) for part in wide.slices(path)]
        return {name: np.concatenate([part[name] for part in parts]) for name in form.parts}

    locks, made = {path: Lock() for path in forms}, dict[str, np.ndarray]()

    def read(name: str) -> np.ndarray:
        if name not in parts:
            return source.read(name)
        path, part = parts[name]
        with locks[path]:  # codes are read first, and the matrix once
            if (array := made.pop(name, None)) is not None:
                return array
            arrays = encoded(path)
            if part == "codes":
                made.update({f"{path}.{other}": arrays[other] for other in forms[path].parts[1:]})
        return arrays[part]

    def split(name: str) -> PartitionSpec:
        path, part = parts.get(name, (name, None))
        spec = source.split(path)
        return forms[path].partition(part, spec) if part else spec

    return replace(
        source,
        paths=[
            name
            for path in source.paths
            for name in ([f"{path}.{part}" for part in forms[path].parts] if path in forms else [path])
        ],
        read=read,
        split=split,
        core=None,
        name=lambda name: source.name(parts[name][0] if name in parts else name),
    )
