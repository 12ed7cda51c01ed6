"""Quantized checkpoints: each weight bit for bit what its format's library makes of it, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import refused
from quantized import INT4, LAYOUTS, VECTORS, Layout, Meaning, checkpoint_of, compressed, gptq, llama, packed, write
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.checkpoint import load_config, open_checkpoint, tensor_files
from jx_neuron.checkpoint.folder import Checkpoint
from jx_neuron.checkpoint.quantized.codes import Coded, Codes
from jx_neuron.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:quantization_config quantizes")
IDS = np.random.default_rng(0).integers(0, 320, (2, 12))
WEIGHT = "model.layer.weight"


def array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def assert_is(checkpoint: Checkpoint, expected: Meaning, name: str = WEIGHT) -> None:
    """Equal in every number; of zeros the sign is free, since bitsandbytes gives fp4's both."""
    exact, rounded = array(expected(True)), array(expected(False))
    wide = checkpoint.read(name)
    assert checkpoint.shape(name) == wide.shape
    assert checkpoint.dtype(name) == wide.dtype == exact.dtype
    np.testing.assert_array_equal(wide, exact)
    np.testing.assert_array_equal(wide.astype(rounded.dtype), rounded)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_widened_bit_for_bit(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    for rows, columns in layout.shapes:
        folder, weight = checkpoint_of(layout, tmp_path, rows, columns)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.names() == {WEIGHT}
        assert "quantization_config" not in checkpoint.config
        assert_is(checkpoint, weight)


@pytest.mark.parametrize("name", ["nf4", "fp4", "odd", "nested", "nested_fp4", "int8"])
def test_what_bitsandbytes_wrote_is_widened_bit_for_bit(name: str, tmp_path: Path) -> None:
    vectors = load_file(VECTORS)
    parts = {
        f"model.layer{key.removeprefix(name)}": part for key, part in vectors.items() if key.startswith(f"{name}.")
    }
    expected = parts.pop("model.layer.expected")
    quantization = {"load_in_8bit": name == "int8", "load_in_4bit": name != "int8"}  # as before there were methods
    checkpoint = open_checkpoint(write(tmp_path, parts, {"quantization_config": quantization}))
    assert checkpoint.names() == {WEIGHT}
    assert_is(checkpoint, lambda _: expected)


def test_gptq_zeros_that_were_borrowed_across_a_word(tmp_path: Path) -> None:
    """https://github.com/ModelCloud/GPTQModel: convert_gptq_v2_to_v1_format_module takes 1 off every number of a word,
    and convert_gptq_v1_to_v2_format_module adds it."""
    layout = gptq(4, 32, checkpoint_format="gptq_v2")
    parts, _ = layout.quantized(16, 32, torch.Generator().manual_seed(0))
    zeros = torch.tensor([[0, 8, 0, 0, 15, 1, 0, 0] * 2])
    second = {
        "qweight": parts["qweight"],
        "qzeros": packed(zeros, 4),
        "scales": parts["scales"],
        "g_idx": parts["g_idx"],
    }
    first = second | {"qzeros": (second["qzeros"].numpy().view(np.uint32) - np.uint32(0x11111111)).view(np.int32)}
    weights = []
    for form, stored in (("gptq_v2", second), ("gptq", first)):
        tensors = {f"model.layer.{name}": torch.as_tensor(part) for name, part in stored.items()}
        config = {"quantization_config": layout.config | {"checkpoint_format": form}}
        weights.append(open_checkpoint(write(tmp_path / form, tensors, config)).read(WEIGHT))
    np.testing.assert_array_equal(*weights)


def logits(folder: Path) -> np.ndarray:
    model = NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=2, n_positions=16, neuron_config=NeuronConfig(output_all_logits=True)
    )
    return np.asarray(model(IDS))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "packed-4-groups-of-11"])
def test_logits_are_those_of_the_widened_weights(name: str, tmp_path: Path) -> None:
    folder, state = llama(LAYOUTS[name], tmp_path)
    model = LlamaForCausalLM(LlamaConfig(**load_config(folder))).float().eval()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(folder), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["packed-4-group", "packed-4-channel-asymmetric", "packed-8", "float8-block"])
def test_logits_are_those_of_hf_with_compressed_tensors(name: str, tmp_path: Path) -> None:
    folder, _ = llama(LAYOUTS[name], tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(folder), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# How tensors are read


def test_nothing_is_read_until_a_weight_is_and_then_its_parts_alone(tmp_path: Path, monkeypatch: Any) -> None:
    folder, state = llama(LAYOUTS["gptq-4-act-order"], tmp_path)
    sizes: list[int] = []

    def read_bytes(path: Path, offset: int, size: int) -> np.ndarray:
        sizes.append(size)
        return whole(path, offset, size)

    whole = tensor_files.read_bytes
    monkeypatch.setattr(tensor_files, "read_bytes", read_bytes)
    checkpoint = open_checkpoint(folder)
    assert not sizes
    checkpoint.read("model.layers.1.mlp.up_proj.weight")
    assert sorted(sizes) == [4 * 4 * 96 // 8, 4 * 64, 2 * 4 * 96, 64 * 96 // 2]
    assert checkpoint.names() == state.keys()


def test_parts_of_a_weight_may_be_in_several_files(tmp_path: Path) -> None:
    folder, weight = checkpoint_of(LAYOUTS["packed-4-group"], tmp_path, 96, 64)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i + 1:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors)}
    for name, file in places.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_is(open_checkpoint(folder), weight)


def test_a_weight_can_be_had_as_it_is_stored(tmp_path: Path) -> None:
    folder, weight = checkpoint_of(LAYOUTS["awq"], tmp_path, 96, 64)
    tensor = open_checkpoint(folder).tensors[WEIGHT]
    assert isinstance(tensor, Coded)
    stored = tensor.stored()
    assert (stored.codes.dtype, stored.codes.shape) == (np.uint8, (96, 64))
    assert stored.scales.shape == (96, 2)
    assert isinstance(stored, Codes)
    np.testing.assert_array_equal(stored.widened(), weight(True).numpy())


def test_a_plan_reads_no_weights(tmp_path: Path) -> None:
    folder, _ = checkpoint_of(LAYOUTS["nf4"], tmp_path, 96, 64)
    (folder / "model.safetensors").unlink()
    assert load_config(folder) == {"model_type": "llama"}


def test_a_bias_of_zeros_is_dropped_where_the_model_has_none(tmp_path: Path) -> None:
    folder, _ = llama(LAYOUTS["gptq-4"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for value, raises in ((0.0, False), (0.1, True)):
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.full((96,), value, dtype=torch.float16)
        save_file(tensors, folder / "model.safetensors")
        if raises:
            with pytest.raises(CheckpointError, match=r"holds tensor model\.layers\.0\.mlp\.up_proj\.bias"):
                logits(folder)
        else:
            assert np.isfinite(logits(folder)).all()


# Which module has which scheme: compressed_tensors/utils/match.py


def weights(**options: Any) -> dict[str, Any]:
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": INT4 | options}}}


def test_names_come_before_patterns_and_both_before_classes(tmp_path: Path) -> None:
    """Three layers in groups of 32, 16 and 64, of a multimodal checkpoint: its names have a prefix."""
    sizes = {"a.down_proj": 32, "a.up_proj": 16, "b.gate_proj": 64}
    tensors, weights = {}, {}
    for module, size in sizes.items():
        layout = compressed("pack-quantized", **INT4 | {"group_size": size})
        parts, weights[module] = layout.quantized(96, 64, torch.Generator().manual_seed(size))
        tensors |= {f"language_model.{module}.{name}": part for name, part in parts.items()}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": INT4 | {"group_size": 64}},
        "group_1": {"targets": ["re:a.*_proj$"], "weights": INT4 | {"group_size": 16}},
        "group_2": {"targets": ["a.down_proj"], "weights": INT4},
    }
    quantization = layout.config | {"config_groups": groups, "ignore": ["re:.*lm_head", "c"]}
    checkpoint = open_checkpoint(write(tmp_path, tensors, {"quantization_config": quantization}))
    for module, weight in weights.items():
        assert_is(checkpoint, weight, f"language_model.{module}.weight")


def test_each_group_may_have_its_format(tmp_path: Path) -> None:
    packed4, int8 = LAYOUTS["packed-4-group"], LAYOUTS["int8-channel"]
    rng = torch.Generator().manual_seed(0)
    (parts_a, a), (parts_b, b) = packed4.quantized(96, 64, rng), int8.quantized(96, 64, rng)
    tensors = {f"m.a.{name}": part for name, part in parts_a.items()}
    tensors |= {f"m.b.{name}": part for name, part in parts_b.items()}
    groups = {}
    for name, layout in (("a", packed4), ("b", int8)):
        of = layout.config["config_groups"]["group_0"]
        groups[name] = of | {"targets": [f"m.{name}"], "format": layout.config["format"]}
    quantization = packed4.config | {"config_groups": groups, "format": "mixed-precision"}
    checkpoint = open_checkpoint(write(tmp_path, tensors, {"quantization_config": quantization}))
    assert_is(checkpoint, a, "m.a.weight")
    assert_is(checkpoint, b, "m.b.weight")
    del quantization["config_groups"]["b"]["format"]
    refused(write(tmp_path, tensors, {"quantization_config": quantization}), "format='mixed-precision'", "each of")


def test_groups_ordered_by_activation(tmp_path: Path) -> None:
    """compressed-tensors until 0.15: weight_g_idx is the group of each column."""
    layout = LAYOUTS["packed-4-group"]
    parts, weight = layout.quantized(96, 64, torch.Generator().manual_seed(0))
    order = torch.randperm(64)
    parts["weight_g_idx"] = (torch.arange(64) // 32)[order].int()
    scale = parts["weight_scale"]
    codes = (weight(True) / scale.float().repeat_interleave(32, dim=1)).round()

    def expected(exact: bool) -> torch.Tensor:
        factors = scale.float() if exact else scale
        return codes.to(factors.dtype) * factors[:, parts["weight_g_idx"].long()]

    tensors = {f"model.layer.{name}": part for name, part in parts.items()}
    quantization = layout.config | weights(actorder="group")
    assert_is(open_checkpoint(write(tmp_path, tensors, {"quantization_config": quantization})), expected)
    del tensors["model.layer.weight_g_idx"]
    refused(write(tmp_path, tensors, {"quantization_config": quantization}), "lacks model.layer.weight_g_idx")


@pytest.mark.filterwarnings("default")
def test_rounded_activations_and_caches_are_said_not_to_be(tmp_path: Path) -> None:
    layout = LAYOUTS["int8-channel"]
    parts, weight = layout.quantized(96, 64, torch.Generator().manual_seed(0))
    tensors = {f"model.layer.{name}": part for name, part in parts.items()}
    tensors |= {
        "model.layer.input_scale": torch.ones(1),
        "model.k_scale": torch.ones(1),
        "model.v_scale": torch.ones(1),
    }
    activations = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    groups = {"g": layout.config["config_groups"]["group_0"] | {"input_activations": activations}}
    quantization = layout.config | {"config_groups": groups, "kv_cache_scheme": activations}
    write(tmp_path, tensors, {"quantization_config": quantization})
    with pytest.warns(UserWarning, match="quantizes activations too") as warned:
        checkpoint = open_checkpoint(tmp_path)
    assert "quantizes the cache of keys and values too" in str(warned[1].message)
    assert checkpoint.names() == {WEIGHT}
    assert_is(checkpoint, weight)


# What is refused


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
        ("packed-4-group", {"quantization_status": "frozen"}, "quantization_status='frozen'"),
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
