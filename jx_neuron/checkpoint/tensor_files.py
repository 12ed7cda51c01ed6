"""Tensors in safetensors and torch files, listed at once and read one at a time."""

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from jx_neuron.errors import CheckpointError
from jx_neuron.util.pages import allocate
from jx_neuron.util.parsing import AGAIN, boundary

Array = npt.NDArray[Any]

MOST_HEADER = 16 * 2**20  # bytes of a safetensors header; 126 layers take some 100 kB
MOST_TENSORS = 100_000
SLICE = 4 * 2**20  # bytes of a tensor that are read at a time where it is not needed whole
TORCH_PAGES = 16 * 2**20  # resident bytes of a mapped torch file, after which it is mapped again

SAFETENSORS_DTYPES: dict[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
QUANTIZED_DTYPES: dict[str, npt.DTypeLike] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""The dtypes of stored tensors that are widened (jx_neuron.checkpoint.quantized)."""
TORCH_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its shape and dtype, and how to read it.

    rows:    reads entries of the first axis, from the first number to before the second; None where only all are read.
    affine:  reads the scale and the offset of each number, where these are code · scale + offset with codes from 0.
    grouped: whether numbers of a row have several scales.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]
    rows: Callable[[int, int], Array] | None = field(default=None, kw_only=True)
    affine: Callable[[], tuple[Array, Array]] | None = field(default=None, kw_only=True)
    grouped: bool = field(default=False, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `load` returns."""
        return prod(self.shape) * self.dtype.itemsize

    def slices(self) -> Iterator[Array]:
        """The tensor in parts of about `SLICE` bytes, along its first axis, where it can be read so."""
        if self.rows is None:
            yield self.load()
        else:
            step = max(1, SLICE * self.shape[0] // max(1, self.nbytes))
            for start in range(0, self.shape[0], step):
                yield self.rows(start, min(start + step, self.shape[0]))

    def part(self, axis: int, index_n: npt.NDArray[np.int64]) -> Array:
        """The entries `index_n`, ascending, of an axis: of about `SLICE` bytes at a time, where it can be read so."""
        if self.rows is None:
            return np.take(self.load(), index_n, axis)
        part = allocate((*self.shape[:axis], len(index_n), *self.shape[axis + 1 :]), self.dtype)
        step = max(1, SLICE * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], step):
            if axis:
                stop = min(start + step, self.shape[0])
                part[start:stop] = np.take(self.rows(start, stop), index_n, axis)
                continue
            low, high = np.searchsorted(index_n, (start, start + step))
            if low < high:
                first = int(index_n[low])
                part[low:high] = self.rows(first, int(index_n[high - 1]) + 1)[index_n[low:high] - first]
        return part


def check_file(path: Path) -> None:
    """Raises CheckpointError where `path` is no file, is empty, or is a Git LFS pointer."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {AGAIN}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); {AGAIN}.")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`.")


def read_bytes(path: Path, offset: int, size: int) -> npt.NDArray[np.uint8]:
    """Reads `size` bytes of `path` from `offset`. It does not map them: mapped pages count as process memory."""
    try:
        data = allocate((size,), np.uint8)
        with path.open("rb") as file:
            file.seek(offset)
            size_read = file.readinto(data.data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if size_read != size:
        raise CheckpointError(f"{path} ends before byte {offset + size}: it is cut short; {AGAIN}.")
    return data


def check_count(path: Path, count: int, what: str = "tensors") -> None:
    """Raises CheckpointError where a file claims more tensors, or more of `what`, than any model has."""
    if count > MOST_TENSORS:
        raise CheckpointError(f"{path} claims {count:,} {what}; legal are {MOST_TENSORS:,}; {AGAIN}.")


def safetensors_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises CheckpointError for a file that is missing, cut short, malformed, or of a dtype not in
    SAFETENSORS_DTYPES. Format: https://github.com/huggingface/safetensors#format
    """
    check_file(path)
    with boundary(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: it claims a header of {length:,} bytes, and legal are "
                f"{MOST_HEADER:,}; {AGAIN}."
            )
        try:
            with safe_open(path, framework="np") as header:  # checks that tensors fill the file, one after the other
                names = header.offset_keys()
                check_count(path, len(names))
                parts = {name: header.get_slice(name) for name in names}
                fields = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}): it is cut short or damaged; {AGAIN}."
            ) from error
    tensors, offset = {}, 8 + length
    for name, (shape, kind) in fields.items():
        if (dtype := (SAFETENSORS_DTYPES | QUANTIZED_DTYPES).get(kind)) is None:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {kind}; legal are {', '.join(SAFETENSORS_DTYPES)}. "
                "Use the checkpoint in bfloat16 or float16, or convert it to one of them."
            )
        tensors[name] = _plain(path, offset, shape, np.dtype(dtype))
        offset += tensors[name].nbytes
    return tensors


def _plain(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    row = prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> Array:
        array = read_bytes(path, offset + start * row, (stop - start) * row)
        return array.view(dtype).reshape(stop - start, *shape[1:])

    if not shape:
        return Tensor(shape, dtype, lambda: read_bytes(path, offset, row).view(dtype).reshape(shape))
    return Tensor(shape, dtype, lambda: rows(0, shape[0]), rows=rows)


def _check_zip(path: Path) -> None:
    """Raises CheckpointError unless the parts of a zipped torch file fill it one after the other, as torch writes them.

    A mapped file is read where its headers point, and its checksums are not checked.
    Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
    """
    with boundary(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        parts = sorted(archive.infolist(), key=lambda part: part.header_offset)
        for part, following in zip(parts, [*(p.header_offset for p in parts[1:]), archive.start_dir], strict=True):
            file.seek(part.header_offset)
            signature, name, extra = struct.unpack("<4s22x2H", file.read(30))
            end = part.header_offset + 30 + name + extra + part.file_size
            whole = part.compress_type == zipfile.ZIP_STORED and following - end in (0, 16, 24)  # a data descriptor
            if signature != b"PK\3\4" or not whole or (part.filename.endswith(".pkl") and part.file_size > MOST_HEADER):
                raise CheckpointError(
                    f"{path}: {part.filename} is not as torch writes it, within {MOST_HEADER:,} bytes where it is a "
                    f"pickle, without compression or gaps: the file is damaged; {AGAIN}."
                )


class _TorchFile:
    """A torch file read by `torch.load(weights_only=True)`, mapped where its format allows.

    Pages stay resident as long as their mapping, so the file is mapped again after TORCH_PAGES. A file that cannot be
    mapped is loaded whole, and each tensor is freed once it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = zipfile.is_zipfile(path)  # files of torch < 1.6 are bare pickles
        self.resident = 0
        self.state: dict[str, Any] = {}
        self.lock = Lock()
        if self.mapped:
            _check_zip(path)

    def load(self) -> dict[str, Any]:
        import torch

        with boundary(self.path):
            try:
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{self.path} holds Python objects other than tensors, or is damaged. Unpickling such "
                    "objects can run any code, so it is refused: get the checkpoint as safetensors, or convert "
                    f"it on a machine you can lose. torch said: {_reason(error)}"
                ) from error
            except (RuntimeError, EOFError, ValueError) as error:
                raise CheckpointError(
                    f"{self.path} is not a whole torch file ({_reason(error)}): it is cut short or damaged; {AGAIN}."
                ) from error
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{self.path} holds a {type(state).__name__}; legal is a dictionary of tensors by name. "
                "Save the model's state_dict()."
            )
        return state

    def read(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        rows = np.empty(shape or (1,), dtype)
        step = max(1, TORCH_PAGES * len(rows) // max(1, rows.nbytes))
        with self.lock:
            for at in range(0, len(rows), step):
                if name not in self.state or self.resident > TORCH_PAGES:
                    self.state, self.resident = self.load(), 0
                part = self.state[name].detach().reshape(rows.shape)[at : at + step].resolve_neg().contiguous()
                rows[at : at + step] = _numpy(part, dtype)
                self.resident += part.nbytes if self.mapped else 0
            if not self.mapped:
                self.state.pop(name, None)
        return rows.reshape(shape)


def _numpy(tensor: Any, dtype: np.dtype[Any]) -> Array:
    import torch

    array: Array = (tensor.view(torch.int16) if dtype == ml_dtypes.bfloat16 else tensor).numpy()
    return array.view(dtype)


def _reason(error: Exception) -> str:
    """The line of torch's long messages that states the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "WeightsUnpickler error" in line), lines[0] if lines else repr(error))


def torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a `pytorch_model.bin` by name; needs torch 2.6.

    Raises CheckpointError where torch is missing or too old, and for a file that is missing, cut short, not
    loadable with `weights_only`, or not a flat dictionary of dense tensors.
    """
    check_file(path)
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading a .bin file needs torch, which is not installed: `pip install torch`, "
            "or get the checkpoint as safetensors."
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise CheckpointError(
            f"{path}: torch {torch.__version__} can be made to run code by a .bin file (CVE-2025-32434): "
            "`pip install -U torch` to 2.6 or newer, or get the checkpoint as safetensors."
        )
    file = _TorchFile(path)
    tensors = {}
    for name, value in file.load().items():
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: the key {name!r} is a {type(name).__name__}; legal are names, as text.")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{path}: {name!r} is {dtype}; legal are dense tensors of {', '.join(TORCH_DTYPES)}. "
                "Save the model's state_dict() alone."
            )
        if value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {name!r} is on the {value.device.type} device, and so has no numbers; "
                "save a state_dict() whose tensors have them."
            )
        shape, kind = tuple(value.shape), np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        tensors[name] = Tensor(shape, kind, partial(file.read, name, shape, kind))
        if tensors[name].nbytes > path.stat().st_size:  # one number, repeated with a stride of 0
            raise CheckpointError(
                f"{path}: {name!r} of shape {shape} takes {tensors[name].nbytes:,} bytes, more than the file has; "
                "save its clone()."
            )
    return tensors
