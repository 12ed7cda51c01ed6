"""MXFP4 (OCP Microscaling Formats, 1.0): blocks of 32 numbers of 4 bits, each block with a power of two as its scale.

https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/mxfp4.py
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jx_neuron.checkpoint.quantized.options import Options
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block
# e2m1: a sign, two bits of exponent, one of mantissa
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Config(Options):
    """The fields of transformers' Mxfp4Config."""

    INERT = "dequantize modules_to_not_convert"  # tensors show these


def widened(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, each pair of blocks and scales as the one tensor that HF makes from it, in bfloat16, which is exact.

    Raises CheckpointError for blocks without scales, and where the shapes of both do not fit.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((BLOCKS, SCALES))}
    for name, blocks in tensors.items():
        if name.endswith(BLOCKS):
            base = name.removesuffix(BLOCKS)
            plain[base] = _pair(base, blocks, tensors.get(base + SCALES))
    return plain


def _pair(name: str, blocks: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        raise CheckpointError(f"the checkpoint has {name + BLOCKS} and lacks {name + SCALES}; download it again")
    legal = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BYTES)
    if not legal or not blocks.dtype == scales.dtype == np.uint8:
        raise CheckpointError(
            f"{name + BLOCKS} is {blocks.dtype.name}{list(blocks.shape)} and {name + SCALES} "
            f"{scales.dtype.name}{list(scales.shape)}; legal are uint8 [experts, rows, blocks, {BYTES}], and the "
            f"same without {BYTES}"
        )
    experts, rows, count, size = blocks.shape
    return Tensor(
        (experts, 2 * size * count, rows), np.dtype(ml_dtypes.bfloat16), lambda: widen(blocks.load(), scales.load())
    )


def widen(blocks: Array, scales: Array) -> Array:
    """bfloat16 [experts, columns, rows] of uint8 [experts, rows, blocks, bytes] and scales [experts, rows, blocks].

    A byte has two numbers, that of its low bits first. A block's are multiplied by 2^(scale - 127).
    """
    experts, rows, count, size = blocks.shape
    wide = np.empty((experts, 2 * size * count, rows), ml_dtypes.bfloat16)
    for expert in range(experts):  # one at a time, for they are float32 in between
        low_high = np.stack([blocks[expert] & 15, blocks[expert] >> 4], axis=-1).reshape(rows, count, 2 * size)
        factor = np.exp2(scales[expert].astype(np.float32) - 127)[..., None]
        with np.errstate(over="ignore"):  # infinite, as in HF
            wide[expert] = (VALUES[low_high] * factor).reshape(rows, -1).T
    return wide
