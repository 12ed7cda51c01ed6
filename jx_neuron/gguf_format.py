"""GGUF files: metadata, and tensors read and dequantized one at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from jx_neuron.errors import CheckpointError
from jx_neuron.pages import room
from jx_neuron.tensor_files import AGAIN, Array, check_file, read_bytes

Metadata = Mapping[str, Any]

PLAIN: Mapping[int, npt.DTypeLike] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}
SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}
BLOCKS = 4096  # quantized blocks dequantized at once: the temporaries stay in the processor's cache


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file: shape outermost dimension first, offset from the start of the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int


@dataclass(frozen=True)
class GGUF:
    """A GGUF file: its metadata, and where its tensors are."""

    path: Path
    metadata: Metadata
    entries: Mapping[str, Entry]


class _Cursor:
    """Reads the little-endian header of a GGUF file front to back."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.at = buffer, 0

    def scalars(self, dtype: str, count: int) -> list[Any]:
        array = np.frombuffer(self.buffer, dtype, count, self.at)
        self.at += array.nbytes
        if dtype == "<f4":  # the shortest decimal that gives the same float32: 1e-05, not 9.999999747378752e-06
            return [float(str(value)) for value in array]
        return list(array.tolist())

    def scalar(self, dtype: str) -> Any:
        return self.scalars(dtype, 1)[0]

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.buffer, self.at)
        start, self.at = self.at + 8, self.at + 8 + length
        return self.buffer[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(SCALARS[kind])
        kind, count = self.scalar("<u4"), self.scalar("<u8")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return self.scalars(SCALARS[kind], count)


def read_gguf(path: Path) -> GGUF:
    """Reads the header of a GGUF file (version 2 or 3, little-endian, in one part).

    The gguf package's own reader takes seconds for a vocabulary of 50,000; this one a tenth of one.
    Raises CheckpointError for a file that is missing, cut short or malformed, or a quantization that the
    gguf package does not know.
    """
    check_file(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            metadata, entries = _header(_Cursor(buffer), path)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: the GGUF header is cut short or damaged ({error}); {AGAIN}.") from error
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge`, and give the file that it writes."
        )
    size = path.stat().st_size
    for name, entry in entries.items():
        _check_type(path, name, entry)
        if entry.offset + _nbytes(entry) > size:
            raise CheckpointError(f"{path}: tensor {name!r} lies beyond the end of the file: cut short; {AGAIN}.")
    return GGUF(path, metadata, entries)


def _header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    if cursor.buffer[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    cursor.at = 4
    version, tensors, keys = cursor.scalar("<u4"), cursor.scalar("<u8"), cursor.scalar("<u8")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}, or big-endian; legal are versions 2 and 3, little-endian. "
            "Convert the model again with a current llama.cpp."
        )
    metadata = {}
    for _ in range(keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<u4"))
    found = []
    for _ in range(tensors):
        name = cursor.string()
        shape = tuple(cursor.scalars("<u8", cursor.scalar("<u4")))[::-1]
        found.append((name, shape, cursor.scalar("<u4"), cursor.scalar("<u8")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    entries = {}
    for name, shape, kind, offset in found:
        if name in entries:
            raise CheckpointError(f"{path}: tensor {name!r} is there twice; {AGAIN}.")
        try:
            entries[name] = Entry(shape, GGMLQuantizationType(kind), start + offset)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the unknown quantization type {kind}; "
                "`pip install -U gguf`, or use a Q8_0 file of the model."
            ) from error
    return metadata, entries


def _check_type(path: Path, name: str, entry: Entry) -> None:
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    if entry.shape and entry.shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name!r} has rows of {entry.shape[-1]}, which {entry.type.name} cannot hold: "
            f"legal are multiples of {block}; {AGAIN}."
        )
    if entry.type not in PLAIN:
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), entry.type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {entry.type.name}, which the gguf package cannot dequantize; "
                "`pip install -U gguf`, or use a Q8_0 file of the model."
            ) from error


def _nbytes(entry: Entry) -> int:
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    return int(prod(entry.shape) // block * size)


def load(path: Path, entry: Entry) -> Array:
    """The tensor of `entry` as it is stored where PLAIN has its type, else dequantized to float32."""
    if entry.type in PLAIN:
        return read_bytes(path, entry.offset, _nbytes(entry)).view(PLAIN[entry.type]).reshape(entry.shape)
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    array = room((prod(entry.shape),), np.float32)
    for at in range(0, array.size, BLOCKS * block):
        out = array[at : at + BLOCKS * block]
        raw = read_bytes(path, entry.offset + at // block * size, out.size // block * size)
        out[:] = gguf.dequantize(raw.reshape(1, -1), entry.type)[0]
    return array.reshape(entry.shape)
