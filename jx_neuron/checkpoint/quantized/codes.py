"""Matrices of small codes with scales, which most formats store, and the numbers that these mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError
from jx_neuron.util.pages import allocate

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
AT_ONCE = 2**18  # numbers widened at once: the temporaries fit the processor's cache


@dataclass(frozen=True)
class Codes:
    """A matrix as it is stored: W[r, c] = (codes[r, c] - zeros[R, g]) · scales[R, g], where R = r // block[0] and g is
    c // block[1], or `group_c` of c.

    codes:   [rows, columns], integers or e4m3.
    scales:  [blocks, groups].
    zeros:   the same shape; None where all are 0.
    block:   rows and columns that share a scale. The last may be cut.
    group_c: [columns], the group of each column, where groups are not of neighbours.
    lowest:  the least code that there may be.
    """

    codes: Array
    scales: Array
    block: tuple[int, int]
    zeros: Array | None = None
    group_c: Array | None = None
    lowest: int = 0

    def widened(self) -> Array:
        """W, float32 [rows, columns]: exact where scales have 16 bits, so that rounded to the dtype of the scales it is
        what a library gives that multiplies in that dtype."""
        rows, columns = self.codes.shape
        scales, zeros = self.scales.astype(np.float32), None if self.zeros is None else self.zeros.astype(np.float32)
        whole = allocate((rows, columns), np.float32)
        step = max(1, AT_ONCE // max(1, columns))
        for at in range(0, rows, step):
            part = whole[at : at + step]
            row_r = np.arange(at, at + len(part))
            part[...] = self.codes[at : at + step]
            if zeros is not None:
                part -= self._each(zeros, row_r)
            part *= self._each(scales, row_r)
        return whole

    def affine(self) -> tuple[Array, Array]:
        """The scale and the offset of each number, [rows, columns], offsets in float16."""
        zeros = np.float32(0) if self.zeros is None else self.zeros.astype(np.float32)
        with np.errstate(over="ignore"):
            offsets = ((self.lowest - zeros) * self.scales.astype(np.float32)).astype(np.float16)
        row_r = np.arange(len(self.codes))
        scales, offsets = (self._each(array, row_r) for array in (self.scales, offsets))
        return np.broadcast_to(scales, self.codes.shape), np.broadcast_to(offsets, self.codes.shape)

    def _each(self, of_groups: Array, row_r: Array) -> Array:
        """An array of groups, repeated for the columns of rows; with one column where it has one."""
        of_rows = of_groups[row_r // self.block[0]]
        if of_rows.shape[1] == 1:
            return of_rows
        group_c = np.arange(self.codes.shape[1]) // self.block[1] if self.group_c is None else self.group_c
        return of_rows.take(group_c, axis=1)


def coded(shape: tuple[int, ...], stored: Callable[[], Codes], grouped: bool) -> Tensor:
    """The tensor of what `stored` reads, float32; `grouped` as in Tensor."""
    return Tensor(
        shape, np.dtype(np.float32), lambda: stored().widened(), affine=lambda: stored().affine(), grouped=grouped
    )


def unpacked(words: Array, bits: int, count: int) -> Array:
    """uint8 [..., count] of int32 [..., words]: number i has the bits from i · bits on, lowest first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[..., :count]
    eights = -(-count // 8)  # 8 numbers take `bits` bytes
    padded = np.zeros((*words.shape[:-1], eights * bits), np.uint8)
    size = min(padded.shape[-1], octets.shape[-1])
    padded[..., :size] = octets[..., :size]
    wide = np.zeros((*words.shape[:-1], eights, 8), np.uint8)
    wide[..., :bits] = padded.reshape(*words.shape[:-1], eights, bits)
    whole = wide.view(np.uint64)[..., 0]
    numbers = np.empty((*words.shape[:-1], eights, 8), np.uint8)
    for i in range(8):
        numbers[..., i] = (whole >> np.uint64(bits * i)) & np.uint64(2**bits - 1)
    return numbers.reshape(*words.shape[:-1], 8 * eights)[..., :count]


def words(count: int, bits: int) -> int:
    """How many int32 `count` numbers take, packed without gaps."""
    return -(-count * bits // 32)


def part(
    tensors: Mapping[str, Tensor],
    name: str,
    dtypes: Sequence[Any],
    shape: tuple[int, ...],
    why: str,
) -> Tensor:
    """The tensor `name`. Raises CheckpointError, which says `why`, where it is missing or of other shape or dtype."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"the checkpoint lacks {name}, and {why}; download it again")
    if tensor.shape != shape or tensor.dtype not in dtypes:
        legal = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise CheckpointError(
            f"{name} is {described(tensor)}; legal is {legal}{list(shape)}, for {why}. config.json and weights are not "
            "of the same model, or damaged"
        )
    return tensor


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype.name}{list(tensor.shape)}"


def whole_groups(name: str, columns: int, size: int) -> int:
    """How many groups of `size` there are. Raises CheckpointError where one would be cut."""
    if columns % size:
        raise CheckpointError(
            f"{name} has {columns} columns, which groups of {size} do not divide; config.json and weights are not of "
            "the same model, or damaged"
        )
    return columns // size


def checked_groups(name: str, group_c: Array, groups: int) -> Array:
    """`group_c`. Raises CheckpointError for groups that there are not."""
    if group_c.size and not 0 <= group_c.min() <= group_c.max() < groups:
        raise CheckpointError(
            f"{name} has groups from {group_c.min()} to {group_c.max()}; legal is from 0 to {groups - 1}; download the "
            "checkpoint again"
        )
    return group_c


def read_small(name: str, tensor: Tensor, most: int) -> Array:
    """A tensor that says how others are read. Raises CheckpointError where it has more than `most` bytes."""
    if tensor.nbytes > most:
        raise CheckpointError(f"{name} has {tensor.nbytes:,} bytes; legal are {most:,}; download it again")
    return tensor.load()


def from_qweights(
    tensors: Mapping[str, Tensor], parts: Sequence[str], weight: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The tensors, with `weight` of each module in the place of its qweight, and without `parts`, its scales and zeros.

    GPTQ and AWQ have these names.
    """
    wide = dict(tensors)
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            wide[f"{module}.weight"] = weight(module)
            for part_name in ("qweight", *parts):
                wide.pop(f"{module}.{part_name}", None)
    return wide
