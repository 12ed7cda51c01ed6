"""FP8 in blocks (DeepSeek-AI, arXiv:2412.19437, 3.3): numbers of 8 bits, e4m3, each block of a matrix with a scale.

https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError
from jx_neuron.util.arguments import shown

METHOD = "fp8"
SCALES = "_scale_inv"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# scale_fmt says which scales there are: powers of two or any, of a dtype that the tensors have
LEGAL: Mapping[str, tuple[Any, ...]] = {
    "activation_scheme": ("dynamic",),
    "expert_dtype": ("fp8", None),
    "fmt": ("e4m3", None),
}


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its checkpoint is in FP8. Raises CheckpointError for FP8 of another form."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        return False
    block_of(config)
    for name, legal in LEGAL.items():
        if (value := quantization.get(name)) not in legal:
            raise _refusal(name, value, str(legal[0]))
    return True


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block. Raises CheckpointError where a config.json has none."""
    block = config["quantization_config"].get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise _refusal("weight_block_size", block, "the rows and columns of a block, such as [128, 128]")
    return block[0], block[1]


def widened(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, those of 8 bits as HF makes them of their blocks, float32.

    Raises CheckpointError for blocks without scales, and where the shapes of both do not fit.
    """
    block = block_of(config)
    wide = dict(tensors)
    for name, codes in tensors.items():
        if codes.dtype == E4M3:
            wide[name] = _pair(name, codes, wide.pop(name + SCALES, None), block)
    return wide


def _pair(name: str, codes: Tensor, scales: Tensor | None, block: tuple[int, int]) -> Tensor:
    if scales is None:
        raise CheckpointError(f"the checkpoint has {name} in 8 bits and lacks {name + SCALES}; download it again")
    legal = tuple(-(-size // of) for size, of in zip(codes.shape, block, strict=False))
    if len(codes.shape) != 2 or scales.shape != legal or scales.dtype != np.float32:
        raise CheckpointError(
            f"{name} is {list(codes.shape)} in blocks of {list(block)}, and {name + SCALES} is "
            f"{scales.dtype.name}{list(scales.shape)}; legal is a matrix, and float32{list(legal)}"
        )
    return Tensor(codes.shape, np.dtype(np.float32), lambda: widen(codes.load(), scales.load(), block))


def widen(codes: Array, scales: Array, block: tuple[int, int]) -> Array:
    """float32 [rows, columns], each block times its scale, where the last of a row or column may be cut."""
    rows, columns = codes.shape
    wide: Array = scales.repeat(block[1], axis=1)[:, :columns].repeat(block[0], axis=0)[:rows]
    return np.multiply(wide, codes.astype(np.float32), out=wide)


def _refusal(field: str, value: object, legal: str) -> CheckpointError:
    return CheckpointError(
        f"quantization_config: {field}={shown(value)} is not supported with quant_method 'fp8'; legal is {legal}. "
        "Use the checkpoint in bfloat16"
    )
