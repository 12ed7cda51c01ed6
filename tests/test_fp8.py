"""FP8 in blocks, as DeepSeek's checkpoints have it: what it is widened to, and what is refused."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from families_mla import OPTIONS
from safetensors.torch import load_file, save_file
from test_families import random_model

from jx_neuron.checkpoint import load_config, open_checkpoint
from jx_neuron.checkpoint.quantized.codes import Codes
from jx_neuron.errors import CheckpointError
from jx_neuron.models import Decoder

pytestmark = pytest.mark.filterwarnings("ignore:quantization_config quantizes")
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


def codes_and_scales(rows: int, columns: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code that is a number, at random, and a scale of each block."""
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
    codes += 128 * torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = -(-rows // block[0]), -(-columns // block[1])
    return codes.view(torch.float8_e4m3fn), torch.rand(shape, generator=generator) * 0.01 + 1e-5


def ours(codes: torch.Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)


def test_blocks_are_widened_to_what_hf_makes_of_them() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = codes_and_scales(384, 256, (128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    wide = Codes(ours(codes), scales.numpy(), (128, 128)).widened()
    np.testing.assert_array_equal(wide, theirs.numpy())
    in_bfloat16 = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    np.testing.assert_array_equal(
        wide.astype(ml_dtypes.bfloat16).view(np.uint16), in_bfloat16.view(torch.uint16).numpy()
    )


def test_the_last_block_of_a_row_or_column_may_be_cut() -> None:
    codes, scales = codes_and_scales(576, 200, (128, 128))
    wide = Codes(ours(codes), scales.numpy(), (128, 128)).widened()
    for row, column in ((0, 0), (127, 128), (511, 199), (575, 127)):
        assert wide[row, column] == codes.float()[row, column] * scales[row // 128, column // 128]


def quantized(folder: Path, **changed: Any) -> dict[str, torch.Tensor]:
    """A checkpoint whose projections of attention and experts are in blocks, and the numbers that these stand for."""
    random_model("deepseek_v3", OPTIONS["deepseek_v3"][0]).save_pretrained(folder)
    tensors, block, wide = load_file(folder / "model.safetensors"), (16, 32), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        codes, scales = codes_and_scales(*tensors[name].shape, block)
        tensors |= {name: codes, name + "_scale_inv": scales}
        each = scales.repeat_interleave(block[0], 0)[: len(codes)].repeat_interleave(block[1], 1)[:, : codes.shape[1]]
        wide[name] = codes.float() * each
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION | changed}))
    return wide


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    wide = quantized(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    source = Decoder.from_config(checkpoint.config).source(checkpoint, np.float32)
    np.testing.assert_array_equal(
        source.read("layers.0.self_attn.q_b_proj.kernel").reshape(20, -1).T,
        wide["model.layers.0.self_attn.q_b_proj.weight"],
    )
    of_experts = [wide[f"model.layers.1.mlp.experts.{e}.down_proj.weight"].T for e in range(8)]
    np.testing.assert_array_equal(source.read("layers.1.mlp.experts.down_proj.kernel"), torch.stack(of_experts))


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """DeepSeek-V3.1's scale_fmt: e8m0, the exponent alone."""
    wide = quantized(tmp_path, scale_fmt="ue8m0")
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.self_attn.o_proj.weight"
    powers = tensors[f"{name}_scale_inv"].log2().round()
    tensors[f"{name}_scale_inv"] = (powers + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors")
    each = powers.exp2().repeat_interleave(16, 0)[: len(wide[name])].repeat_interleave(32, 1)[:, : wide[name].shape[1]]
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read(name), tensors[name].float() * each)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_block_size": None}, r"in blocks of all, and .*_scale_inv is float32.*legal is .* float32\[1, 1\]"),
        ({"weight_block_size": [16]}, r"weight_block_size=\[16\] is not supported.*legal is two numbers"),
        ({"weight_block_size": [0, 16]}, "weight_block_size.0=0 is not supported.*legal is greater than 0"),
        ({"activation_scheme": "none"}, "activation_scheme='none' is not supported.*legal is 'dynamic' or 'static'"),
        ({"fmt": "e5m2"}, "fmt='e5m2' is not supported.*legal is 'e4m3'"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported.*legal is 'fp8'"),
        ({"outliers": 0.01}, "outliers=0.01 is not known with quant_method 'fp8'"),
        ({"weight_block_size": [16, 16]}, r"is \[\d+, \d+\] in blocks of \[16, 16\], and .*_scale_inv is float32"),
        ({"quant_method": "compressed-tensors"}, "quantization_config lacks config_groups"),
        ({"quant_method": "hqq"}, "quant_method='hqq' is not supported; legal are awq, bitsandbytes, compressed"),
    ],
)
def test_other_forms_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantized(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    quantized(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj\.weight in 8 bits and lacks .*o_proj\.weight_scale_inv"):
        open_checkpoint(tmp_path)


def test_a_plan_needs_no_tensors(tmp_path: Path) -> None:
    quantized(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "quantization_config" not in load_config(tmp_path)
