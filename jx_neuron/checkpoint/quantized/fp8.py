"""FP8, e4m3, with a scale a tensor, or a block of one (DeepSeek-AI, arXiv:2412.19437, 3.3).

https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from collections.abc import Mapping
from typing import Literal

import ml_dtypes
import numpy as np

from jx_neuron.checkpoint.quantized.codes import E4M3, FLOATS, Codes, coded, described
from jx_neuron.checkpoint.quantized.options import Options, TwoSizes, warn_of_activations
from jx_neuron.checkpoint.tensor_files import Tensor
from jx_neuron.errors import CheckpointError

SCALES = ("_scale_inv", "_scale")  # transformers' name, whose scale is not inverted either, and that of AutoFP8
OF_ACTIVATIONS = ("activation_scale", "input_scale")
POWER_OF_2 = np.dtype(ml_dtypes.float8_e8m0fnu)


class Config(Options):
    """The fields of fine-grained FP8 in transformers, and of AutoFP8."""

    INERT = "dequantize ignored_layers modules_to_convert modules_to_not_convert scale_fmt"  # tensors show these
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: TwoSizes | None = None
    fmt: Literal["e4m3", "float8_e4m3fn"] | None = None
    expert_dtype: Literal["fp8"] | None = None
    kv_cache_scheme: None = None


def widened(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, those of 8 bits in float32.

    Raises CheckpointError for codes without scales, and where the shapes of both do not fit.
    """
    warn_of_activations("activations to fp8")
    wide = dict(tensors)
    for name, codes in tensors.items():
        if codes.dtype == E4M3:
            scale = next((name + suffix for suffix in SCALES if name + suffix in tensors), name + SCALES[0])
            wide[name] = _weight(name, codes, scale, wide.pop(scale, None), config.weight_block_size)
            for suffix in OF_ACTIVATIONS:
                wide.pop(f"{name.removesuffix('weight')}{suffix}", None)
    return wide


def _weight(name: str, codes: Tensor, scale: str, scales: Tensor | None, block: list[int] | None) -> Tensor:
    if scales is None:
        raise CheckpointError(f"the checkpoint has {name} in 8 bits and lacks {scale}; download it again")
    high, wide = block or [max(1, size) for size in (*codes.shape, 1, 1)[:2]]
    grid = tuple(-(-size // of) for size, of in zip(codes.shape, (high, wide), strict=False))
    one = () if block else ((), (1,))
    if len(codes.shape) != 2 or scales.shape not in (grid, *one) or scales.dtype not in (*FLOATS, POWER_OF_2):
        raise CheckpointError(
            f"{name} is {list(codes.shape)} in blocks of {block or 'all'}, and {scale} is {described(scales)}; legal "
            f"is a matrix, and float32{list(grid)}"
        )

    def stored() -> Codes:
        return Codes(codes.load(), scales.load().reshape(grid), (high, wide))

    return coded(codes.shape, stored, grid[1] > 1)
