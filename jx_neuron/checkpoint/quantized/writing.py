"""Matrices as compressed-tensors stores them: what compressed_tensors.widened reads.

Integers of 8 bits are packed too where activations are not quantized, since vLLM reads them so
(model_executor/layers/quantization/compressed_tensors/compressed_tensors.py, _get_scheme_from_parts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jx_neuron.checkpoint.quantized.codes import E4M3, words
from jx_neuron.checkpoint.quantized.compressed_tensors import METHOD, Format
from jx_neuron.checkpoint.tensor_files import Array
from jx_neuron.nn.quantized import Form, symmetric_codes

AT_ONCE = 2**22  # numbers encoded at once
BITS = {"int8": 8, "fp8": 8, "int4": 4}


@dataclass(frozen=True)
class Stored:
    """How matrices are stored: int8 and fp8 with a scale a row, int4 with one for each `group` inputs of a row.

    activations: of int8 and fp8, whether the config has activations rounded to 8 bits, with a scale a token.
    """

    kind: Literal["int8", "fp8", "int4"]
    group: int | None = None
    activations: bool = False

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The quantization_config of a model whose linear layers are stored so, except for the modules of `ignore`."""
        numbers = {"num_bits": BITS[self.kind], "type": "float" if self.kind == "fp8" else "int", "symmetric": True}
        strategy = "group" if self.group else "channel"
        group = {
            "targets": ["Linear"],
            "weights": numbers | {"strategy": strategy, "group_size": self.group, "dynamic": False},
            "input_activations": numbers | {"strategy": "token", "dynamic": True} if self.activations else None,
            "output_activations": None,
        }
        return {
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "format": self._format,
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
        }

    @property
    def _format(self) -> Format:
        if self.kind == "fp8":
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"

    def parts(self, matrix: Array, dtype: Any, affine: Sequence[Array] = ()) -> Mapping[str, Array]:
        """The tensors of a matrix [outputs, inputs], by the ends of their names; scales are of `dtype`.

        affine: the scale and the offset that each number is stored with, as Form.encode takes them, or none.
        """
        arrays, step = (matrix, *affine), max(1, AT_ONCE // matrix.shape[1])
        encoded = [self._encoded(dtype, *(a[at : at + step] for a in arrays)) for at in range(0, len(matrix), step)]
        codes, scales = map(np.concatenate, zip(*encoded, strict=True))
        if self._format != "pack-quantized":
            return {"weight": codes, "weight_scale": scales}
        return {
            "weight_packed": _packed(codes, BITS[self.kind]),
            "weight_scale": scales,
            "weight_shape": np.array(matrix.shape, np.int64),
        }

    def _encoded(self, dtype: Any, rows: Array, *affine: Array) -> tuple[Array, Array]:
        """Codes [rows, inputs], int8 or e4m3, and scales [rows, groups]."""
        if self.kind == "int4":
            arrays = (rows.astype(np.float32, copy=False), *affine[:1])
            split = (array.reshape(len(rows), -1, self.group or rows.shape[1]) for array in arrays)
            codes, scales = symmetric_codes(next(split), 2, dtype, next(split, None))
            return codes.reshape(rows.shape).astype(np.int8), scales
        parts = Form(self.kind, 1, rows=True).encode(rows, dtype, (affine[0], affine[1]) if affine else None)
        # float8_e4m3 and e4m3fn have the same bits up to 240
        codes = parts["codes"].view(E4M3) if self.kind == "fp8" else parts["codes"]
        return codes, parts["scales"][:, None]


def _packed(codes: Array, bits: int) -> Array:
    """int32 [rows, words] of codes [rows, columns], to which half their range is added, the lowest bits first."""
    rows, columns = codes.shape
    numbers = np.zeros((rows, words(columns, bits) * 32 // bits), np.uint8)
    numbers[:, :columns] = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    octets = numbers if bits == 8 else numbers[:, ::2] | numbers[:, 1::2] << np.uint8(4)
    return octets.view(np.int32)
