"""bitsandbytes: LLM.int8() (Dettmers et al., arXiv:2208.07339), and 4 bits of a table (QLoRA, arXiv:2305.14314).

https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (dequantize_4bit,
int8_vectorwise_dequant)
"""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, Literal

import ml_dtypes
import numpy as np
from pydantic import Field

from jx_neuron.checkpoint.quantized.codes import described, part, read_small
from jx_neuron.checkpoint.quantized.options import Options, Size, TwoSizes, parsed, refusal, warn_of_activations
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError
from jx_neuron.util.pages import allocate
from jx_neuron.util.parsing import parse_json

METHOD = "bitsandbytes"
F32, U8, I8 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int8)
STATE = ".quant_state.bitsandbytes__"
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": F32, "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
MOST_STATE = 4096  # bytes of a quant_state, which take some 150
PER_127 = np.float32(7.874015718698502e-3)
AT_ONCE = 2**18  # numbers widened at once: the temporaries fit the processor's cache


class Config(Options):
    """The fields of transformers' BitsAndBytesConfig."""

    INERT = """
        bnb_4bit_compute_dtype bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant
        llm_int8_enable_fp32_cpu_offload llm_int8_skip_modules llm_int8_threshold
    """  # each tensor has a state that says the same
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    old_8bit: bool = Field(False, alias="_load_in_8bit")
    old_4bit: bool = Field(False, alias="_load_in_4bit")
    llm_int8_has_fp16_weight: Literal[False] = False


class State(Options):
    """A quant_state: what a tensor of 4 bits is."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: TwoSizes
    nested_blocksize: Size | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


def widened(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors; those of 8 bits in float32, those of 4 in the dtype that they were quantized from."""
    eight, four = config.load_in_8bit or config.old_8bit, config.load_in_4bit or config.old_4bit
    if eight == four:
        raise refusal("load_in_8bit", eight, "either load_in_8bit or load_in_4bit", METHOD)
    if eight:
        warn_of_activations("activations to int8")
    wide = dict(tensors)
    for name in tensors:
        if eight and name.endswith(".SCB"):
            module = name.removesuffix("SCB")
            wide[f"{module}weight"] = _int8(tensors, module)
            for suffix in ("SCB", "weight_format"):
                wide.pop(module + suffix, None)
        elif four and STATE in name:
            weight = name.partition(STATE)[0]
            wide[weight] = _four_bits(tensors, weight, name)
            for suffix in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"):
                wide.pop(weight + suffix, None)
            del wide[name]
    return wide


def _int8(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    codes = tensors.get(f"{module}weight")
    if codes is None or len(codes.shape) != 2 or codes.dtype != I8:
        raise CheckpointError(
            f"{module}weight is {'missing' if codes is None else described(codes)}, and there is {module}SCB; legal is "
            "an int8 matrix. config.json and weights are not of the same model, or damaged"
        )
    rows, columns = codes.shape
    scales = part(tensors, f"{module}SCB", [F32], (rows,), f"{module}weight is int8{[rows, columns]}")
    layout = tensors.get(f"{module}weight_format")

    def load() -> Array:
        if layout is not None and read_small(f"{module}weight_format", layout, 8).any():
            raise CheckpointError(f"{module}weight_format is not 0: legal is the layout by rows, which is 0")
        wide = allocate((rows, columns), F32)
        np.multiply(codes.load(), scales.load()[:, None], out=wide, dtype=F32)
        return np.multiply(wide, PER_127, out=wide)

    def affine() -> tuple[Array, Array]:
        shape = rows, columns
        return np.broadcast_to((scales.load() * PER_127)[:, None], shape), np.broadcast_to(np.float16(0), shape)

    return Tensor((rows, columns), F32, load, affine=affine)


def _four_bits(tensors: Mapping[str, Tensor], weight: str, name: str) -> Tensor:
    fields = parse_json(read_small(name, tensors[name], MOST_STATE).tobytes(), name)
    state = parsed(State, fields, METHOD, name)
    shape, size = (state.shape[0], state.shape[1]), state.blocksize
    count = prod(shape)
    blocks = -(-count // size)
    codes = tensors.get(weight)
    if codes is None or codes.nbytes != -(-count // 2):
        raise CheckpointError(
            f"{weight} is {'missing' if codes is None else described(codes)}; legal are {-(-count // 2):,} bytes, for "
            f"{name} says {list(shape)}. It is damaged: download it again"
        )
    why = f"{weight} is {list(shape)} in blocks of {size}"
    table = part(tensors, f"{weight}.quant_map", [F32], (16,), why)
    if (nested := state.nested_blocksize) is None:
        scales = part(tensors, f"{weight}.absmax", [F32], (blocks,), why).load
    else:
        scales = partial(
            _nested,
            part(tensors, f"{weight}.absmax", [U8], (blocks,), why),
            part(tensors, f"{weight}.nested_quant_map", [F32], (256,), why),
            part(tensors, f"{weight}.nested_absmax", [F32], (-(-blocks // nested),), why),
            nested,
            state.nested_offset or 0.0,
        )
    dtype = DTYPES[state.dtype]

    def load() -> Array:
        packed = codes.load().view(np.uint8).reshape(-1)
        whole, of_blocks, pairs = allocate((count,), dtype), scales(), _pairs(table.load())
        step = AT_ONCE // size * size
        for at in range(0, count, step):
            out = whole[at : at + step]
            wide = pairs[packed[at // 2 : (at + step) // 2]].reshape(-1)[: len(out)]
            wide *= of_blocks[at // size : (at + step) // size].repeat(size)[: len(out)]
            out[...] = wide
        return whole.reshape(shape)

    return Tensor(shape, dtype, load)


def _pairs(table: Array) -> Array:
    """float32 [256, 2], the numbers of a byte: that of its high bits first."""
    byte = np.arange(256)
    return table[np.stack([byte >> 4, byte & 15], axis=-1)]


def _nested(codes: Tensor, table: Tensor, scales: Tensor, size: int, offset: float) -> Array:
    """Scales that are quantized in blocks themselves, float32."""
    wide = table.load()[codes.load()]
    wide *= scales.load().repeat(size)[: len(wide)]
    return wide + np.float32(offset)
