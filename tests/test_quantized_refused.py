"""Quantized checkpoints that are refused: options that cannot be read, and tensors that do not fit them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from quantized import LAYOUTS, Layout, write
from test_quantized_checkpoints import WEIGHT, weights

from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.checkpoint.quantized import compressed_tensors
from jx_neuron.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:quantization_config quantizes")


def changed(layout: Layout, folder: Path, config: dict[str, Any], edit: Any = None) -> Path:
    parts, _ = layout.quantized(96, 64, torch.Generator().manual_seed(0))
    tensors = {f"model.layer.{name}": part for name, part in parts.items()}
    if edit:
        edit(tensors)
    return write(folder, tensors, {"quantization_config": layout.config | config})


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("packed-4-group", {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not supported"),
        ("packed-4-group", {"format": "marlin-24"}, "legal is 'int-quantized', 'naive-quantized'"),
        ("packed-4-group", {"format": "int-quantized"}, "model.layer.weight is missing"),
        ("packed-4-group", {"quantization_status": "calibration"}, "quantization_status='calibration'"),
        ("packed-4-group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format='sparse-24-b"),
        ("packed-4-group", {"transform_config": {"r1": {}}}, "transform_config={'r1': {}} is not supported"),
        ("packed-4-group", {"outliers": 0.01}, "outliers=0.01 is not known with quant_method 'compressed-tensors'"),
        ("packed-4-group", {"config_groups": {"g": ["Linear"]}}, "config_groups.g=['Linear'] is not supported"),
        ("packed-4-group", {"config_groups": {}}, "no target of config_groups with weights is model.layer"),
        ("packed-4-group", {"ignore": ["re:.*layer"]}, "`ignore` has model.layer, and the checkpoint has"),
        ("packed-4-group", {"ignore": ["re:("]}, "legal is a regular expression after re:"),
        ("packed-4-group", weights(strategy="tensor_group"), "weights.strategy='tensor_group' is not supported"),
        ("packed-4-group", weights(num_bits=9), "weights.num_bits=9 is not supported"),
        ("packed-4-group", weights(num_bits=3), "model.layer.weight_packed is int32[96, 8]; legal is int32[96, 6]"),
        ("packed-4-group", weights(type="float"), "num_bits=8 where type is 'float'"),
        ("packed-4-group", weights(group_size=None), "a group_size of 1 or more where strategy is 'group'"),
        ("packed-4-group", weights(group_size=48), "has 64 columns, which groups of 48 do not divide"),
        ("packed-4-group", weights(group_size=16), "weight_scale is bfloat16[96, 2]; legal is .*[96, 4]"),
        ("packed-4-group", weights(symmetric=False), "lacks model.layer.weight_zero_point"),
        ("packed-4-group", weights(strategy="block", group_size=None), "a block_structure, such as [128, 128]"),
        ("packed-4-group", weights(dynamic=True), "weights.dynamic=True is not supported"),
        ("int8-block", weights(strategy="block", block_structure="16x0"), "block_structure.1=0 is not supported"),
        ("int8-channel", weights(strategy="channel", type="float", num_bits=8), "is int8[96, 64]; legal is float8"),
        ("gptq-4", {"bits": 5}, "bits=5 is not supported with quant_method 'gptq'; legal is 2, 3, 4 or 8"),
        ("gptq-4", {"bits": 8}, "model.layer.qweight is int32[8, 96]; legal is int32[16, 96]"),
        ("gptq-4", {"bits": True}, "bits=True is not supported"),
        ("gptq-4", {"group_size": 0}, "group_size=0 is not supported with quant_method 'gptq'; legal is -1"),
        ("gptq-4", {"group_size": 16}, "qzeros is int32[2, 12]; legal is int32[4, 12]"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported"),
        ("gptq-4", {"is_marlin_format": True}, "is_marlin_format=True is not supported"),
        ("gptq-4", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic={'+:.*': {'bits': 8}} is not supported"),
        ("gptq-4", {"pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
        ("awq", {"version": "gemv"}, "version='gemv' is not supported with quant_method 'awq'; legal is 'gemm'"),
        ("awq", {"bits": 8}, "bits=8 is not supported"),
        ("awq", {"zero_point": False}, "zero_point=False is not supported"),
        ("awq", {"group_size": 48}, "has 64 columns, which groups of 48 do not divide"),
        ("fp8-tensor", {"weight_block_size": [128, 128]}, "weight_scale is float32[]; legal is a matrix, and"),
        ("nf4", {"load_in_8bit": True}, "load_in_8bit=True is not supported"),
        ("nf4", {"load_in_8bit": True, "load_in_4bit": False, "_load_in_4bit": False}, "has none of the scales"),
        ("llm-int8", {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True is not supported"),
        ("awq", {"quant_method": "exl2"}, "quant_method='exl2' is not supported; legal are awq, bitsandbytes"),
        ("awq", {"quant_method": None}, "quant_method=None is not supported"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_read(name: str, config: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused(changed(LAYOUTS[name], tmp_path, config), *words.split(".*"))


@pytest.mark.parametrize("pattern", [r"(?=(\w|\w\w|\.)*!)", "a" * 1001, "(" * 400 + "a" + ")*" * 400])
def test_a_pattern_that_would_take_for_ever(pattern: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Names are the checkpoint's too, so they may be as long as it likes."""
    monkeypatch.setattr(compressed_tensors, "SECONDS", 0.1)
    layout = LAYOUTS["packed-4-group"]
    parts, _ = layout.quantized(96, 64, torch.Generator().manual_seed(0))
    tensors = {f"model.{60 * 'a'}.{name}": part for name, part in parts.items()}
    write(tmp_path, tensors, {"quantization_config": layout.config | {"ignore": [f"re:{pattern}"]}})
    refused(tmp_path, "targets or ignore=", "a regular expression after re: that takes no time")


def test_a_quantization_config_that_is_no_object(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(1)}, {"quantization_config": [4]})
    refused(tmp_path, "quantization_config is [4]; legal is an object")


def without(part: str) -> Any:
    return lambda tensors: tensors.pop(f"model.layer.{part}")


def other(part: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({f"model.layer.{part}": tensor})


def state(**fields: Any) -> Any:
    whole = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 64]} | fields
    text = torch.tensor(list(json.dumps(whole).encode()), dtype=torch.uint8)
    return other("weight.quant_state.bitsandbytes__nf4", text)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("packed-4-group", without("weight_shape"), "weight_shape is missing, which format 'pack-quantized' needs"),
        ("packed-4-group", other("weight_shape", torch.tensor([96, 128])), "float16 or bfloat16[96, 4]"),
        ("packed-4-group", other("weight_shape", torch.tensor([96, -1])), "weight_shape is [96, -1]; legal are rows"),
        ("packed-4-group", other("weight_shape", torch.tensor([2**40, 64])), "weight_shape is [1099511627776, 64]"),
        ("packed-4-group", other("weight_shape", torch.zeros(2)), "weight_shape is float32[2]"),
        ("packed-4-group", without("weight_packed"), "lacks model.layer.weight_packed"),
        ("packed-4-group", other("weight_packed", torch.zeros(96, 8)), "is float32[96, 8]; legal is int32"),
        ("int8-channel", without("weight"), "model.layer.weight is missing, and there is model.layer.weight_scale"),
        ("int8-channel", other("weight", torch.zeros(96, 64)), "weight is float32[96, 64]; legal is int8[96, 64]"),
        ("int8-channel", without("weight_scale"), "model.layer.weight' is int8[96, 64], and has none of the scales"),
        ("int8-channel", other("weight_scale", torch.ones(96)), "weight_scale is float32[96]"),
        ("int8-channel", other("weight_scale", torch.ones(96, 1).double()), "weight_scale is float64[96, 1]"),
        ("int8-channel", other("weight_scale", torch.ones(64, 1)), "weight_scale is float32[64, 1]"),
        ("gptq-4", without("qzeros"), "lacks model.layer.qzeros"),
        ("gptq-4", without("scales"), "lacks model.layer.scales"),
        ("gptq-4-act-order", without("g_idx"), "lacks model.layer.g_idx, and desc_act is true"),
        ("gptq-4", other("g_idx", torch.zeros(40).int()), "qweight is int32[8, 96]; legal is int32[5, 96]"),
        ("gptq-4", other("g_idx", torch.zeros(64)), "model.layer.g_idx is float32[64]; legal is int32[64]"),
        ("gptq-4", other("g_idx", torch.tensor(1)), "legal is int32[0, 96]"),
        ("gptq-4", other("qweight", torch.zeros(8).int()), "qweight is int32[8]; legal is a matrix"),
        ("gptq-4", other("scales", torch.ones(2, 96).int()), "scales is int32[2, 96]"),
        ("awq", other("qweight", torch.zeros(64, 12)), "qweight is float32[64, 12]; legal is an int32 matrix"),
        ("awq", other("qzeros", torch.zeros(2, 11).int()), "qzeros is int32[2, 11]; legal is int32[2, 12]"),
        ("fp8-tensor", without("weight_scale"), "model.layer.weight in 8 bits and lacks"),
        ("fp8-tensor", other("weight_scale", torch.ones(96)), "weight_scale is float32[96]; legal is a matrix"),
        ("nf4", without("weight"), "model.layer.weight is missing; legal are 3,072 bytes"),
        ("nf4", without("weight.absmax"), "lacks model.layer.weight.absmax"),
        ("nf4", without("weight.quant_state.bitsandbytes__nf4"), "is uint8[3072, 1], and has none of the scales"),
        ("nf4", state(shape=[96, 65]), "legal are 3,120 bytes, for"),
        ("nf4", state(shape=[96]), "shape=[96] is not supported with quant_method 'bitsandbytes'; legal is two"),
        ("nf4", state(shape=[2**31, 2]), "legal is less than 2147483648"),
        ("nf4", state(blocksize=48), "blocksize=48 is not supported"),
        ("nf4", state(blocksize=128), "weight.absmax is float32[96]; legal is float32[48]"),
        ("nf4", state(dtype="float64"), "dtype='float64' is not supported"),
        ("nf4", state(quant_type="af4"), "quant_type='af4' is not supported"),
        ("nf4", state(nested_blocksize=256), "weight.absmax is float32[96]; legal is uint8[96]"),
        ("nf4", other("weight.quant_state.bitsandbytes__nf4", torch.zeros(9000, dtype=torch.uint8)), "9,000 bytes"),
        ("nf4", other("weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8)), "not JSON"),
        ("llm-int8", other("SCB", torch.ones(95)), "SCB is float32[95]; legal is float32[96]"),
        ("llm-int8", without("SCB"), "is int8[96, 64], and has none of the scales"),
        ("llm-int8", without("weight"), "model.layer.weight is missing, and there is model.layer.SCB"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(name: str, edit: Any, words: str, tmp_path: Path) -> None:
    refused(changed(LAYOUTS[name], tmp_path, {}, edit), words)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        (
            "gptq-4-act-order",
            other("g_idx", torch.arange(64).int() // 16 + 1),
            "g_idx has groups from 1 to 4",
        ),
        ("gptq-4-act-order", other("g_idx", torch.arange(64).int() // 16 - 1), "g_idx has groups from -1 to 2"),
        ("llm-int8", other("weight_format", torch.tensor(1, dtype=torch.uint8)), "weight_format is not 0"),
    ],
)
def test_numbers_that_do_not_fit(name: str, edit: Any, words: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(changed(LAYOUTS[name], tmp_path, {}, edit))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(WEIGHT)


@pytest.mark.parametrize("name", ["packed-4-group", "gptq-4", "awq", "fp8-tensor", "nf4-nested", "llm-int8"])
def test_a_file_that_is_cut_short(name: str, tmp_path: Path) -> None:
    file = changed(LAYOUTS[name], tmp_path, {}) / "model.safetensors"
    checkpoint, whole = open_checkpoint(tmp_path), file.read_bytes()
    file.write_bytes(whole[:-600])
    refused(tmp_path, str(file), "cut short")
    file.write_bytes(whole[:300])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends before byte"):
        checkpoint.read(WEIGHT)
