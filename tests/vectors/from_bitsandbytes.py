"""Writes bitsandbytes.safetensors: weights that bitsandbytes 0.50.2 quantized on a CPU, and dequantized.

`pip install bitsandbytes==0.50.2`, and run it. Of each case there are the tensors of a checkpoint, and `expected`.
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

CASES = {  # quant_type, double quantization, dtype, shape, blocksize
    "nf4": ("nf4", False, torch.float32, (12, 50), 64),
    "fp4": ("fp4", False, torch.float16, (12, 50), 64),
    "odd": ("nf4", False, torch.bfloat16, (7, 13), 32),
    "nested": ("nf4", True, torch.bfloat16, (132, 64), 32),
    "nested_fp4": ("fp4", True, torch.float32, (9, 64), 64),
}


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, (kind, nested, dtype, shape, size) in CASES.items():
        weight = torch.randn(shape).to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=size, compress_statistics=nested, quant_type=kind)
        tensors[f"{name}.weight"] = codes
        tensors |= {f"{name}.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
        tensors[f"{name}.expected"] = functional.dequantize_4bit(codes, state)
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(9, 31).half())
    tensors |= {"int8.weight": codes, "int8.SCB": scales, "int8.weight_format": torch.tensor(0, dtype=torch.uint8)}
    tensors["int8.expected"] = functional.int8_vectorwise_dequant(codes, scales)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(__file__).parent / "bitsandbytes.safetensors",
    )


if __name__ == "__main__":
    main()
