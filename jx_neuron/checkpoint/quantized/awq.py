"""AWQ (Lin et al., arXiv:2306.00978) in AutoAWQ's `gemm` layout: 4 bits in groups of inputs, packed along the outputs.

https://github.com/casper-hansen/AutoAWQ/blob/main/awq/utils/packing_utils.py (dequantize_gemm)
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from jx_neuron.checkpoint.quantized.codes import (
    FLOATS,
    Codes,
    coded,
    described,
    from_qweights,
    part,
    unpacked,
    whole_groups,
)
from jx_neuron.checkpoint.quantized.options import GroupSize, Options
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError

INT32 = np.dtype(np.int32)
PER_WORD = 8
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the numbers of a word are


class Config(Options):
    """The fields of AWQ, as AutoAWQ, GPTQModel and transformers write them."""

    INERT = """
        act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_percent dataset desc_act
        do_fuse exllama_config fuse_max_seq_len lm_head max_input_length meta method model_seqlen
        module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse modules_to_not_convert
        pad_token_id sym tokenizer true_sequential
    """
    bits: Literal[4] = 4
    group_size: GroupSize = 128
    zero_point: Literal[True] = True
    version: Literal["gemm", "GEMM"] = "gemm"
    format: Literal["gemm"] = "gemm"
    checkpoint_format: Literal["gemm"] | None = None
    pack_dtype: Literal["int32"] | None = None
    dynamic: None = None
    activation: None = None
    rotation: None = None

    @property
    def integer_bits(self) -> int:
        return self.bits


def widened(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, each qweight with its zeros and scales as the weight, float32."""
    return from_qweights(tensors, ("qzeros", "scales"), lambda module: _weight(tensors, module, config.group_size))


def _weight(tensors: Mapping[str, Tensor], module: str, group_size: int) -> Tensor:
    packed = tensors[f"{module}.qweight"]
    if len(packed.shape) != 2 or packed.dtype != INT32:
        raise CheckpointError(f"{module}.qweight is {described(packed)}; legal is an int32 matrix")
    columns, rows = packed.shape[0], packed.shape[1] * PER_WORD
    size = columns if group_size == -1 else group_size
    groups = whole_groups(module, columns, size)
    why = f"{module} has {rows} outputs and {columns} inputs in groups of {group_size}"
    zeros = part(tensors, f"{module}.qzeros", [INT32], (groups, packed.shape[1]), why)
    scales = part(tensors, f"{module}.scales", FLOATS, (groups, rows), why)

    def stored() -> Codes:
        codes, offsets = (_in_order(unpacked(words.load(), 4, rows)).T for words in (packed, zeros))
        return Codes(codes, scales.load().T, (1, size), offsets)

    return coded((rows, columns), stored, groups > 1)


def _in_order(numbers: Array) -> Array:
    of_words = numbers.reshape(len(numbers), -1, PER_WORD)
    return of_words[..., ORDER].reshape(numbers.shape)
