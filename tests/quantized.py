"""Weights in each quantized layout, and what they mean by the format's own library or, where that needs a GPU or a
compiler, by its published arithmetic done one number at a time."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import FIELDS, llama_state
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

VECTORS = Path(__file__).parent / "vectors" / "bitsandbytes.safetensors"
Parts = dict[str, torch.Tensor]
Meaning = Callable[[bool], torch.Tensor]
"""The weight that parts mean: as its library computes it, in the dtype of the scales, or with scales in float32."""


@dataclass(frozen=True)
class Layout:
    """A quantization_config, and a function from the shape of a weight to its parts and their meaning."""

    config: dict[str, Any]
    quantized: Callable[[int, int, torch.Generator], tuple[Parts, Meaning]]
    shapes: tuple[tuple[int, int], ...] = ((96, 64), (32, 96))


def integers(low: int, high: int, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=rng)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] of [rows, columns]: the bits of a row as one long integer, lowest first."""
    words = math.ceil(numbers.shape[1] * bits / 32)
    whole = [sum(int(number) << (bits * i) for i, number in enumerate(row)) for row in numbers]
    return torch.from_numpy(
        np.array([[row >> (32 * word) & 0xFFFFFFFF for word in range(words)] for row in whole], np.uint32).view(
            np.int32
        )
    )


# compressed-tensors: the library's compressors write and read


def compressed(
    format: str, dtype: torch.dtype = torch.bfloat16, shapes: tuple[tuple[int, int], ...] = (), **weights: Any
) -> Layout:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": format,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
        "global_compression_ratio": None,
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format)

    def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[Parts, Meaning]:
        kind, args = scheme.weights.strategy, scheme.weights
        blocks = {
            "tensor": lambda: (1,),
            "channel": lambda: (rows, 1),
            "group": lambda: (rows, columns // args.group_size),
            "block": lambda: (math.ceil(rows / args.block_structure[0]), math.ceil(columns / args.block_structure[1])),
        }[kind]()
        most = 448 if args.type == "float" else 2 ** (args.num_bits - 1)
        state = {
            "weight": (0.1 * torch.randn(rows, columns, generator=rng)).to(dtype),
            "weight_scale": ((0.2 + 0.1 * torch.rand(blocks, generator=rng)) / most).to(dtype),
        }
        if not args.symmetric:
            half = 2 ** (args.num_bits - 1)
            state["weight_zero_point"] = integers(-half, half - 1, blocks, rng).to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(format)
        parts = compressor.compress(state, scheme)

        def weight(exact: bool) -> torch.Tensor:
            scale = parts["weight_scale"].float() if exact else parts["weight_scale"]
            return compressor.decompress(parts | {"weight_scale": scale}, scheme)["weight"]

        return parts, weight

    return Layout(config, quantized, shapes or Layout.shapes)


# GPTQ: https://github.com/AutoGPTQ/AutoGPTQ/blob/v0.7.1/auto_gptq/nn_modules/qlinear/qlinear_cuda.py


def gptq(bits: int, group_size: int, shapes: tuple[tuple[int, int], ...] = (), **options: Any) -> Layout:
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False,
        "checkpoint_format": "gptq", "damp_percent": 0.1, "lm_head": False, "true_sequential": True,
        "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    } | options  # fmt: skip
    first = config["checkpoint_format"] == "gptq"

    def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[Parts, Meaning]:
        groups = 1 if group_size == -1 else math.ceil(columns / group_size)
        codes = integers(0, 2**bits - 1, (columns, rows), rng)
        zeros = integers(1 if first else 0, 2**bits - 1, (groups, rows), rng)
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if config["sym"] else zeros
        scales = ((0.2 + 0.1 * torch.rand((groups, rows), generator=rng)) / 2**bits).half()
        group_c = torch.arange(columns) // (columns if group_size == -1 else group_size)
        if config["desc_act"]:
            group_c = group_c[torch.randperm(columns, generator=rng)]

        def weight(exact: bool) -> torch.Tensor:
            factors = scales.float() if exact else scales
            return torch.stack([factors[group] * (codes[i] - zeros[group]) for i, group in enumerate(group_c)], dim=1)

        return {
            "qweight": packed(codes.T, bits).T,
            "qzeros": packed(zeros - 1 if first else zeros, bits),
            "scales": scales,
            "g_idx": group_c.int(),
        }, weight

    return Layout(config, quantized, shapes or Layout.shapes)


# AWQ: https://github.com/casper-hansen/AutoAWQ/blob/v0.2.9/awq/modules/linear/gemm.py (from_linear)


def awq(group_size: int, shapes: tuple[tuple[int, int], ...] = (), **options: Any) -> Layout:
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    } | options  # fmt: skip

    def interleaved(numbers: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
        for place, number in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= numbers[:, number::8] << (4 * place)
        return words.int()

    def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[Parts, Meaning]:
        size = columns if group_size == -1 else group_size
        codes = integers(0, 15, (columns, rows), rng)
        zeros = integers(0, 15, (columns // size, rows), rng)
        scales = ((0.2 + 0.1 * torch.rand((columns // size, rows), generator=rng)) / 16).half()

        def weight(exact: bool) -> torch.Tensor:
            factors = scales.float() if exact else scales
            each = [(codes[i] - zeros[i // size]) * factors[i // size] for i in range(columns)]
            return torch.stack(each, dim=1)

        return {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}, weight

    return Layout(config, quantized, shapes or Layout.shapes)


# FP8 a tensor: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/integrations/finegrained_fp8.py


def fp8(scale: str, **options: Any) -> Layout:
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None} | options

    def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[Parts, Meaning]:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        codes = (100 * torch.randn(rows, columns, generator=rng)).to(torch.float8_e4m3fn)
        scales = torch.tensor(0.001 + 0.001 * torch.rand(1, generator=rng).item())
        parts = {"weight": codes, scale: scales, "input_scale": torch.tensor(1.0)}
        return parts, lambda _: Fp8Dequantize(None)._dequantize_one(codes, scales.reshape(1, 1), torch.float32)

    return Layout(config, quantized)


# bitsandbytes: tests/vectors/from_bitsandbytes.py


def bitsandbytes_4bit(kind: str, nested: bool) -> Layout:
    """Parts with the names of QuantState.as_dict."""
    vectors = load_file(VECTORS)
    table = vectors[f"{kind}.weight.quant_map"]
    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
        "_load_in_8bit": False, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    }  # fmt: skip

    def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[Parts, Meaning]:
        count, size = rows * columns, 64
        blocks = math.ceil(count / size)
        codes = integers(0, 15, (count,), rng)
        codes = torch.cat([codes, codes.new_zeros(count % 2)])
        state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": [rows, columns]}
        parts = {"weight": ((codes[::2] << 4) | codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": table}
        if nested:
            inner = vectors["nested.weight.nested_quant_map"]
            absmax, of_absmax = (
                integers(0, 255, (blocks,), rng),
                0.1 + torch.rand(math.ceil(blocks / 256), generator=rng),
            )
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.3}
            parts |= {
                "weight.absmax": absmax.to(torch.uint8),
                "weight.nested_absmax": of_absmax,
                "weight.nested_quant_map": inner,
            }
            scales = torch.stack([inner[code] * of_absmax[i // 256] + 0.3 for i, code in enumerate(absmax)])
        else:
            scales = parts["weight.absmax"] = 0.1 + torch.rand(blocks, generator=rng)
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        weight = torch.stack([table[code] * scales[i // size] for i, code in enumerate(codes[:count])])
        return parts, lambda _: weight.reshape(rows, columns).to(torch.bfloat16)

    return Layout(config, quantized)


def bitsandbytes_8bit() -> Layout:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}

    def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[Parts, Meaning]:
        codes, scales = integers(-127, 127, (rows, columns), rng).to(torch.int8), torch.rand(rows, generator=rng)
        weight = codes * scales.view(-1, 1) * 7.874015718698502e-3
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, lambda _: weight

    return Layout(config, quantized)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
ODD = ((5, 33), (1, 7), (33, 1))
LAYOUTS = {
    "int8-channel": compressed("int-quantized", num_bits=8, strategy="channel", shapes=((96, 64), *ODD)),
    "int8-tensor": compressed("int-quantized", torch.float32, num_bits=8, strategy="tensor", shapes=((96, 64), *ODD)),
    "int8-group-asymmetric": compressed(
        "naive-quantized", torch.float16, num_bits=8, strategy="group", group_size=16, symmetric=False
    ),
    "int8-channel-asymmetric": compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False, shapes=ODD),
    "int8-block": compressed(
        "naive-quantized", num_bits=8, strategy="block", block_structure=[16, 24], shapes=((40, 64), *ODD)
    ),
    "packed-4-group": compressed("pack-quantized", **INT4),
    "packed-4-groups-of-11": compressed(
        "pack-quantized", **INT4 | {"symmetric": False, "group_size": 11}, shapes=((13, 33), (40, 22))
    ),
    "packed-4-channel-asymmetric": compressed(
        "pack-quantized", torch.float16, num_bits=4, strategy="channel", symmetric=False, shapes=((96, 64), (13, 33))
    ),
    "packed-8": compressed("pack-quantized", torch.float32, num_bits=8, strategy="channel", shapes=((96, 64), *ODD)),
    **{
        f"packed-{bits}": compressed("pack-quantized", num_bits=bits, strategy="tensor", shapes=((40, 64), *ODD))
        for bits in (2, 3, 5, 6, 7)
    },
    "float8-channel": compressed("float-quantized", type="float", strategy="channel", shapes=((96, 64), *ODD)),
    "float8-tensor": compressed("float-quantized", torch.float32, type="float", strategy="tensor"),
    "float8-block": compressed(
        "float-quantized", type="float", strategy="block", block_structure=[16, 24], shapes=((40, 64), *ODD)
    ),
    "gptq-4": gptq(4, 32),
    "gptq-4-act-order": gptq(4, 16, desc_act=True),
    "gptq-4-v2": gptq(4, 64, checkpoint_format="gptq_v2"),
    "gptq-4-groups-cut": gptq(4, 40),
    "gptq-4-odd": gptq(4, 16, shapes=((40, 56), (8, 24), (24, 8))),
    "gptq-8-odd": gptq(8, 24, shapes=((36, 52), (4, 28), (20, 4)), checkpoint_format="gptq_v2", desc_act=True),
    "gptq-2": gptq(2, -1),
    "gptq-3": gptq(3, 32),
    "gptq-3-v2-act-order": gptq(3, 32, checkpoint_format="gptq_v2", desc_act=True),
    "gptq-8": gptq(8, 32, desc_act=True),
    "awq": awq(32),
    "awq-one-group": awq(-1, shapes=((96, 64), (32, 96), (8, 33), (40, 7))),
    "awq-groups-of-11": awq(11, shapes=((40, 33), (8, 11))),
    "fp8-tensor": fp8("weight_scale", ignored_layers=["lm_head"]),
    "fp8-tensor-inverse": fp8("weight_scale_inv", modules_to_not_convert=["lm_head"], dequantize=False),
    "nf4": bitsandbytes_4bit("nf4", nested=False),
    "nf4-nested": bitsandbytes_4bit("nf4", nested=True),
    "fp4": bitsandbytes_4bit("fp4", nested=False),
    "llm-int8": bitsandbytes_8bit(),
}


def write(folder: Path, tensors: Parts, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def checkpoint_of(layout: Layout, folder: Path, rows: int, columns: int) -> tuple[Path, torch.Tensor]:
    """A folder of one quantized weight, and its meaning."""
    parts, weight = layout.quantized(rows, columns, torch.Generator().manual_seed(rows * columns))
    config = {"model_type": "llama", "quantization_config": layout.config}
    return write(folder, {f"model.layer.{name}": part for name, part in parts.items()}, config), weight


def llama(layout: Layout, folder: Path, prefix: str = "model.") -> tuple[Path, Parts]:
    """A tiny Llama whose projections are quantized, and its state with their weights in float32."""
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.from_numpy(array) for name, array in llama_state().items()}
    stored = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            parts, weight = layout.quantized(*tensor.shape, rng)
            state[name] = weight(True).float()
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = tensor
    config = FIELDS | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": True}
    renamed = {name.replace("model.", prefix, 1): value for name, value in stored.items()}
    return write(folder, renamed, config | {"quantization_config": layout.config}), state
