"""Writing safetensors files of many ranks, tensor by tensor."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Protocol

import numpy as np

from jx_neuron.checkpoint.tensor_files import QUANTIZED_DTYPES, SAFETENSORS_DTYPES, Array

PIECE = 16 * 2**20  # bytes written at once


class Writable(Protocol):
    """A file that bytes are written to."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_safetensors(
    files: Sequence[Writable],
    layouts: Mapping[str, tuple[str, tuple[int, ...]]],
    parts: Callable[[str], Sequence[Array]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes several files of the same tensors, (dtype, shape) by name, tensor by tensor.

    parts:    returns a tensor's array for each file, C-contiguous; it is called once a tensor.
    metadata: what the files say of themselves, as {"format": "pt"} does.

    Where all tensors have one dtype, the bytes are the same as safetensors itself writes.

    safetensors' save_file needs every tensor of a file at once, and holds the GIL meanwhile, Ctrl-C included.
    Format: https://huggingface.co/docs/safetensors/index#format
    """
    kinds = {np.dtype(dtype).name: kind for kind, dtype in (SAFETENSORS_DTYPES | QUANTIZED_DTYPES).items()}
    names = sorted(layouts, key=lambda name: (-np.dtype(layouts[name][0]).itemsize, name))
    sizes = [prod(layouts[name][1]) * np.dtype(layouts[name][0]).itemsize for name in names]
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    header |= {
        name: {"dtype": kinds[layouts[name][0]], "shape": layouts[name][1], "data_offsets": place}
        for name, place in zip(names, pairwise(accumulate(sizes, initial=0)), strict=True)
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    for file in files:
        file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        for file, array in zip(files, parts(name), strict=True):
            numbers = array.reshape(-1).view(np.uint8)
            for start in range(0, len(numbers), PIECE):
                file.write(numbers[start : start + PIECE].data)
