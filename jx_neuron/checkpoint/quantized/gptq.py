"""GPTQ (Frantar et al., arXiv:2210.17323): integers of 2 to 8 bits in groups of inputs, packed along the inputs.

https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/nn_modules/qlinear/__init__.py (dequantize_weight)
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from jx_neuron.checkpoint.quantized.codes import (
    FLOATS,
    Codes,
    checked_groups,
    coded,
    described,
    from_qweights,
    part,
    unpacked,
    words,
)
from jx_neuron.checkpoint.quantized.options import GroupSize, Options
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError

INT32 = np.dtype(np.int32)


class Config(Options):
    """The fields of GPTQ, as AutoGPTQ, GPTQModel and optimum write them."""

    INERT = """
        act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent
        dataset disable_exllama exllama_config lm_head max_input_length meta method model_file_base_name
        model_name_or_path model_seqlen module_name_preceding_first_block modules_in_block_to_quantize mse pad_token_id
        quantizer static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama
    """
    bits: Literal[2, 3, 4, 8]
    group_size: GroupSize = 128
    desc_act: bool = False
    format: Literal["gptq", "gptq_v2"] = "gptq"
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    is_marlin_format: Literal[False] | None = None
    pack_dtype: Literal["int32"] | None = None
    dynamic: None = None
    activation: None = None
    rotation: None = None

    @property
    def integer_bits(self) -> int:
        return self.bits


def widened(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, each qweight with its zeros and scales as the weight, float32."""
    return from_qweights(tensors, ("qzeros", "scales", "g_idx"), lambda module: _weight(tensors, module, config))


def _weight(tensors: Mapping[str, Tensor], module: str, config: Config) -> Tensor:
    bits, order = config.bits, tensors.get(f"{module}.g_idx")
    packed = tensors[f"{module}.qweight"]
    if len(packed.shape) != 2:
        raise CheckpointError(f"{module}.qweight is {described(packed)}; legal is a matrix")
    if config.desc_act and order is None:
        raise CheckpointError(f"the checkpoint lacks {module}.g_idx, and desc_act is true; download it again")
    columns = packed.shape[0] * 32 // bits if order is None else order.shape[0] if order.shape else 0
    rows = packed.shape[1]
    size = columns if config.group_size == -1 else config.group_size
    groups = -(-columns // max(1, size))
    why = f"{module} has {rows} outputs and {columns} inputs of {bits} bits in groups of {config.group_size}"
    packed = part(tensors, f"{module}.qweight", [INT32], (words(columns, bits), rows), why)
    zeros = part(tensors, f"{module}.qzeros", [INT32], (groups, words(rows, bits)), why)
    scales = part(tensors, f"{module}.scales", FLOATS, (groups, rows), why)
    if order is not None:
        part(tensors, f"{module}.g_idx", [INT32], (columns,), why)
    first = (config.checkpoint_format or config.format) == "gptq"

    def stored() -> Codes:
        return Codes(
            codes=unpacked(packed.load().T, bits, columns),
            scales=scales.load().T,
            block=(1, size),
            zeros=_zeros(zeros.load(), bits, rows, first).T,
            group_c=None if order is None else checked_groups(f"{module}.g_idx", order.load(), groups),
        )

    return coded((rows, columns), stored, groups > 1)


def _zeros(packed: Array, bits: int, count: int, first: bool) -> Array:
    """The zeros, [groups, outputs]. The `first` version of the format stores them less 1, borrowed across a word where
    that is below 0 (convert_gptq_v1_to_v2_format_module)."""
    if not first:
        return unpacked(packed, bits, count)
    if bits == 3:  # some cross words
        return (unpacked(packed, bits, count) + 1) & 7
    ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
    return unpacked(packed.view(np.uint32) + ones, bits, count)
