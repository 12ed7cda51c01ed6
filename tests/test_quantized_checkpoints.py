"""Quantized checkpoints: each weight bit for bit what its format's library makes of it, and the logits of a model."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import refused
from quantized import INT4, LAYOUTS, VECTORS, Meaning, checkpoint_of, compressed, gptq, llama, packed, write
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig
from jx_neuron.checkpoint import load_config, open_checkpoint, tensor_files
from jx_neuron.checkpoint.folder import Checkpoint
from jx_neuron.checkpoint.quantized import bitsandbytes, codes
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


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "gptq-4-act-order", "packed-4-groups-of-11", "float8-block"])
def test_weights_larger_than_is_widened_at_once(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(codes, "AT_ONCE", 200)
    monkeypatch.setattr(bitsandbytes, "AT_ONCE", 200)
    layout = LAYOUTS[name]
    folder, weight = checkpoint_of(layout, tmp_path, *layout.shapes[0])
    assert_is(open_checkpoint(folder), weight)


def test_four_bits_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage, which FSDP needs to be that of the other weights."""
    folder, weight = checkpoint_of(LAYOUTS["nf4"], tmp_path, 96, 64)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {WEIGHT: tensors[WEIGHT].reshape(-1, 2).view(torch.bfloat16)}, folder / "model.safetensors")
    assert_is(open_checkpoint(folder), weight)


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


ONE_A_METHOD = ("packed-4-group", "gptq-4-act-order", "awq", "fp8-tensor", "nf4-nested", "llm-int8")
FITTING = [name for name in LAYOUTS if name not in ("packed-4-groups-of-11", "awq-groups-of-11")]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", [name if name in ONE_A_METHOD else pytest.param(name, marks=pytest.mark.slow) for name in FITTING]
)
def test_logits_are_those_of_the_widened_weights(name: str, tmp_path: Path) -> None:
    folder, state = llama(LAYOUTS[name], tmp_path)
    model = LlamaForCausalLM(LlamaConfig(**load_config(folder))).float().eval()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(folder), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["packed-4-group", "packed-8", "float8-block"])
def test_logits_are_those_of_hf_with_compressed_tensors(name: str, tmp_path: Path) -> None:
    folder, _ = llama(LAYOUTS[name], tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(folder), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "form"), [("awq", "int4"), ("gptq-8", "int8"), ("packed-4-group", "int4"), ("fp8-tensor", None)]
)
def test_a_checkpoint_of_integers_that_is_widened_says_how_it_is_not(
    name: str, form: str | None, tmp_path: Path
) -> None:
    folder, _ = llama(LAYOUTS[name], tmp_path)

    def said(quant: str | None) -> list[str]:
        config = NeuronConfig(quant=quant and QuantizationConfig.named(quant))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=16, neuron_config=config)
        return [str(each.message) for each in caught if "widened" in str(each.message)]

    if form is None:
        assert said(None) == []
    else:
        (message,) = said(None)
        assert f"weights of {form[-1]} bits, which are widened to f32. --quant {form}" in message
        assert said(form) == []


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


@pytest.mark.parametrize(
    "name", ["packed-4-group", "packed-4-groups-of-11", "gptq-4-act-order", "gptq-8", "awq", "int8-channel-asymmetric"]
)
def test_the_scales_and_offsets_of_numbers_can_be_had(name: str, tmp_path: Path) -> None:
    """Each number is code · scale + offset, and codes are from 0 to what their bits hold."""
    layout = LAYOUTS[name]
    folder, _ = checkpoint_of(layout, tmp_path, *layout.shapes[0])
    checkpoint = open_checkpoint(folder)
    wide, pair = checkpoint.read(WEIGHT), checkpoint.affine(WEIGHT)
    assert pair is not None
    scales, offsets = (each.astype(np.float32) for each in pair)
    assert wide.shape == scales.shape == offsets.shape
    found = (wide - offsets) / scales
    np.testing.assert_allclose(found, found.round(), atol=0.13)  # of 255, float16 rounds 1/2^12 away
    assert found.round().min() >= 0
    assert found.round().max() <= (255 if "8" in name else 15)


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
    numbers = (weight(True) / scale.float().repeat_interleave(32, dim=1)).round()

    def expected(exact: bool) -> torch.Tensor:
        factors = scale.float() if exact else scale
        return numbers.to(factors.dtype) * factors[:, parts["weight_g_idx"].long()]

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
