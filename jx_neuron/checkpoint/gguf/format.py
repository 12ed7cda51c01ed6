"""GGUF files: metadata, and tensors read and dequantized one at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Annotated, Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType
from pydantic import BaseModel, ConfigDict, Field

from jx_neuron.checkpoint.tensor_files import Array, check_count, check_file, read_bytes
from jx_neuron.errors import CheckpointError
from jx_neuron.util.pages import allocate
from jx_neuron.util.parsing import AGAIN, boundary, typed

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
SCALARS: Mapping[int, str] = {  # to struct and numpy alike
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
AFFINE = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q4_K)
GROUP = 32  # numbers that share a scale in a block of AFFINE
MOST_HEADER = 24 * 2**20  # bytes; a vocabulary of 200,000 with its merges takes 12 MB
NO_TOKEN = 2**32 - 1  # LLAMA_TOKEN_NULL, -1, as the unsigned number that keys of token ids hold
MOST_AXES = 4  # GGML_MAX_DIMS
VOCABULARY = frozenset(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores"))
BLOCKS = 4096  # quantized blocks dequantized at once: the temporaries fit the processor's cache


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

    def without_vocabulary(self) -> "GGUF":
        """This without the tokenizer's lists, which take more memory than all else."""
        kept = {key: value for key, value in self.metadata.items() if key not in VOCABULARY}
        return replace(self, metadata=kept)


class _Layout(BaseModel):
    """The keys that say how the file is laid out."""

    model_config = ConfigDict(strict=True)
    alignment: Annotated[int, Field(alias="general.alignment", ge=1)] = gguf.GGUF_DEFAULT_ALIGNMENT
    parts: Annotated[int, Field(alias="split.count", ge=0)] = 1


class _Cursor:
    """Reads the little-endian header of a GGUF file front to back."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.at = buffer, 0

    def take(self, count: int, size: int = 1) -> int:
        """Moves past `count` values of `size` bytes each; returns where they start."""
        start = self.at
        if (end := start + count * size) > len(self.buffer):
            raise ValueError(f"cut short: a header to byte {end:,} at least, of {len(self.buffer):,}")
        self.at = end
        return start

    def times(self, count: int, least: int) -> range:
        """range(count), where the buffer can hold `count` parts of at least `least` bytes."""
        self.at = self.take(count, least)
        return range(count)

    def scalars(self, dtype: str, count: int) -> list[Any]:
        start = self.take(count, np.dtype(dtype).itemsize)
        return list(np.frombuffer(self.buffer, dtype, count, start).tolist())

    def scalar(self, dtype: str) -> Any:
        (value,) = struct.unpack_from(dtype, self.buffer, self.take(struct.calcsize(dtype)))
        # the shortest decimal that gives the same float32: 1e-05, not 9.999999747378752e-06
        return float(str(np.float32(value))) if dtype == "<f" else value

    def string(self) -> str:
        start = self.take(self.scalar("<Q"))
        return self.buffer[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_scalar_format(kind))
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in self.times(count, 8)]
        return self.scalars(_scalar_format(kind), count)


def _scalar_format(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return SCALARS[kind]


def read_gguf(path: Path) -> GGUF:
    """Reads the header of a GGUF file (version 2 or 3, little-endian, in one part).

    The gguf package's own reader takes seconds for a vocabulary of 50,000; this one a tenth of one.
    Raises CheckpointError for a file that is missing, cut short or malformed, or a quantization that the
    gguf package does not know.
    """
    check_file(path)
    size = path.stat().st_size
    with boundary(path), path.open("rb") as file:
        with mmap.mmap(file.fileno(), min(size, MOST_HEADER), access=mmap.ACCESS_READ) as buffer:
            metadata, entries = _header(_Cursor(buffer), path)
        for name, entry in entries.items():
            if entry.offset + _nbytes(entry) > size:
                raise CheckpointError(f"{path}: tensor {name!r} is beyond the end of the file: cut short; {AGAIN}.")
    return GGUF(path, metadata, entries)


def _header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    if cursor.buffer[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    cursor.at = 4
    version, tensors, keys = cursor.scalar("<I"), cursor.scalar("<Q"), cursor.scalar("<Q")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}, or big-endian; legal are versions 2 and 3, little-endian. "
            "Convert the model again with a current llama.cpp."
        )
    check_count(path, keys, "keys")
    check_count(path, tensors)
    metadata: dict[str, Any] = {}
    for _ in cursor.times(keys, 13):  # a key's length, a type and a byte
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path}: the key {key!r} is there twice; {AGAIN}.")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    layout = typed(_Layout, metadata, str(path))
    if layout.parts > 1:
        raise CheckpointError(
            f"{path} is one of {layout.parts} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge`, and give the file that it writes."
        )
    if layout.alignment.bit_count() != 1:
        raise CheckpointError(f"{path}: general.alignment is {layout.alignment}; legal are powers of two; {AGAIN}.")
    infos = []
    for _ in cursor.times(tensors, 32):
        name, axes = cursor.string(), cursor.scalar("<I")
        if not 1 <= axes <= MOST_AXES:
            raise CheckpointError(f"{path}: tensor {name!r} has {axes} axes; legal are 1 to {MOST_AXES}; {AGAIN}.")
        shape = tuple(cursor.scalars("<Q", axes))[::-1]
        infos.append((name, shape, cursor.scalar("<I"), cursor.scalar("<Q")))
    start = end = _aligned(cursor.at, layout)
    entries: dict[str, Entry] = {}
    for name, shape, kind, offset in infos:
        if name in entries:
            raise CheckpointError(f"{path}: tensor {name!r} is there twice; {AGAIN}.")
        entries[name] = entry = Entry(shape, _quantization(path, name, shape, kind), start + offset)
        if entry.offset != end:  # https://github.com/ggml-org/ggml/blob/master/src/gguf.cpp: one after the other
            raise CheckpointError(f"{path}: tensor {name!r} is at byte {entry.offset:,}, not {end:,}; {AGAIN}.")
        end = _aligned(end + _nbytes(entry), layout)
    return metadata, entries


def _aligned(offset: int, layout: _Layout) -> int:
    return -(-offset // layout.alignment) * layout.alignment


def _quantization(path: Path, name: str, shape: tuple[int, ...], number: int) -> GGMLQuantizationType:
    """The quantization type of that number. Raises CheckpointError where it cannot be read, or not with that shape."""
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown quantization type {number}; "
            "`pip install -U gguf`, or use a Q8_0 file of the model."
        ) from error
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the shape {list(shape)}, which {kind.name} cannot hold: "
            f"legal are rows of multiples of {block}; {AGAIN}."
        )
    if not _readable(kind):
        raise CheckpointError(
            f"{path}: tensor {name!r} is {kind.name}, which the gguf package cannot dequantize; "
            "`pip install -U gguf`, or use a Q8_0 file of the model."
        )
    return kind


@cache
def _readable(kind: GGMLQuantizationType) -> bool:
    if kind not in PLAIN:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
    return True


def _nbytes(entry: Entry) -> int:
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    return int(prod(entry.shape) // block * size)


def part(entry: Entry, start: int, stop: int) -> Entry:
    """Entries of a tensor's first axis, of two axes or more: from `start` to before `stop`."""
    row = _nbytes(replace(entry, shape=(1, *entry.shape[1:])))
    return replace(entry, shape=(stop - start, *entry.shape[1:]), offset=entry.offset + start * row)


def load(path: Path, entry: Entry) -> Array:
    """The tensor of `entry`: as stored where PLAIN has its type, else dequantized to float32."""
    if entry.type in PLAIN:
        return read_bytes(path, entry.offset, _nbytes(entry)).view(PLAIN[entry.type]).reshape(entry.shape)
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    array = allocate((prod(entry.shape),), np.float32)
    for at in range(0, array.size, BLOCKS * block):
        out = array[at : at + BLOCKS * block]
        raw = read_bytes(path, entry.offset + at // block * size, out.size // block * size)
        out[:] = gguf.dequantize(raw.reshape(1, -1), entry.type)[0]
    return array.reshape(entry.shape)


def affine(path: Path, entry: Entry) -> tuple[Array, Array]:
    """The scale and the offset of each number of a tensor whose type is one of AFFINE: float16, [rows, columns]; those
    of Q4_K, products of two numbers, are rounded."""
    block, size = gguf.GGML_QUANT_SIZES[entry.type]
    raw = read_bytes(path, entry.offset, _nbytes(entry)).reshape(-1, size)
    # ahead of the codes, a block has a scale, or a scale and a minimum: ggml/src/ggml-common.h
    header = np.ascontiguousarray(raw[:, : size - block // 2])
    halves = header.view(np.float16)
    if entry.type == GGMLQuantizationType.Q4_K:  # d, dmin, and 12 bytes of factors for the 8 groups of the block
        factors, minimums = gguf.quants.Q4_K.get_scale_min(header[:, 4:])
        wide = halves[:, :2].astype(np.float32)
        scales, offsets = (wide[:, :1] * factors).astype(np.float16), (wide[:, 1:] * -1.0 * minimums).astype(np.float16)
    else:
        scales = halves[:, 0]
        offsets = halves[:, 1] if entry.type == GGMLQuantizationType.Q4_1 else scales * np.float16(-8)
    scales, offsets = (array.repeat(GROUP).reshape(entry.shape) for array in (scales, offsets))
    return scales, offsets
