"""Quantized checkpoints, widened: each format gives what its own library dequantizes, tensor by tensor as it is read.

One module a format, whose `Config` is the quantization_config of a config.json, and whose `widened` makes weights of
the tensors that have codes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jx_neuron.checkpoint.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from jx_neuron.checkpoint.quantized.codes import E4M3, described
from jx_neuron.checkpoint.quantized.options import FIELD, INSTEAD, Options, parsed
from jx_neuron.checkpoint.tensor_files import Tensor
from jx_neuron.errors import CheckpointError
from jx_neuron.util.arguments import shown

__all__ = ["FIELD", "METHODS", "check", "integer_bits", "widened"]

METHODS: Mapping[str, tuple[type[Options], Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]]] = {
    "awq": (awq.Config, awq.widened),
    "bitsandbytes": (bitsandbytes.Config, bitsandbytes.widened),
    "compressed-tensors": (compressed_tensors.Config, compressed_tensors.widened),
    "fp8": (fp8.Config, fp8.widened),
    "gptq": (gptq.Config, gptq.widened),
    "mxfp4": (mxfp4.Config, mxfp4.widened),
}
ONLY_QUANTIZED = (E4M3, np.dtype(ml_dtypes.float8_e8m0fnu))


def check(config: Mapping[str, Any]) -> tuple[str, Options] | None:
    """The method and options of a config.json's quantization_config; None where there is none.

    Raises CheckpointError for a method or an option that is not supported, by name.
    """
    fields = config.get(FIELD)
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{FIELD} is {shown(fields)}; legal is an object")
    # transformers wrote bitsandbytes' first configs without a method (quantizers/auto.py)
    implied = "bitsandbytes" if fields.get("load_in_8bit") or fields.get("load_in_4bit") else None
    method = fields.get("quant_method", implied)
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{FIELD}: quant_method={shown(method)} is not supported; legal are {', '.join(METHODS)}. {INSTEAD}"
        )
    return method, parsed(METHODS[method][0], fields, method)


def integer_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of a quantized weight, by a config.json's quantization_config; None where no codes are integers."""
    quantization = check(config)
    return quantization and quantization[1].integer_bits


def widened(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Mapping[str, Tensor]:
    """The tensors of the checkpoint `name`, with weights in the place of what its config.json says is quantized.

    Raises CheckpointError where config and tensors do not fit, and for codes of which the config says nothing, since
    they have scales somewhere.
    """
    quantization = check(config)
    if quantization is not None:
        method, options = quantization
        tensors = METHODS[method][1](tensors, options)
    for tensor_name, tensor in tensors.items():
        if tensor.dtype in ONLY_QUANTIZED:
            raise CheckpointError(
                f"{name}: tensor {tensor_name!r} is {_safetensors_name(tensor)}, which is legal where {FIELD} in "
                f"config.json says how it is quantized. Use the checkpoint in BF16 or F16."
            )
        if quantization is not None and tensor_name.endswith(".weight") and tensor.dtype.kind in "iu":
            raise CheckpointError(
                f"{name}: tensor {tensor_name!r} is {described(tensor)}, and has none of the scales that quant_method "
                f"{method!r} stores; download the checkpoint again"
            )
    return tensors


def _safetensors_name(tensor: Tensor) -> str:
    return "F8_E4M3" if tensor.dtype == E4M3 else "F8_E8M0"
