"""GGUF files of every architecture, against the HF models that are written so: tensors, configs and rotations."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import transformers_reading
from converted import Converter
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType
from gguf_models import MODELS
from test_families import random_model
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.checkpoint.gguf.architectures import ARCHITECTURES
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.models import Decoder
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.nn.positions import positions_of

# of which a file has other forms, and what follows from them is compared
FORMS = """attn_config global_head_dim head_dim layer_types n_inner no_rope_layers num_global_key_value_heads
original_max_position_embeddings per_layer_config rope_parameters rope_scaling rope_theta
partial_rotary_factor sliding_window sliding_window_pattern max_position_embeddings""".split()


# which transformers reads too, without biases that its defaults do not have
HF_READS = "bloom gemma2 gemma3_text gpt2 llama nemotron phi3 qwen2 qwen3 stablelm starcoder2".split()


def rotations(config: Any) -> dict[str, np.ndarray]:
    """Cosines and sines of 40 positions, by layer type."""
    if not isinstance(config, RopeConfig):
        return {}
    at = positions_of(jnp.zeros((1,), jnp.int32), jnp.full((1,), 40, jnp.int32), None, 40, 40)
    return {kind: np.stack(rope(at)) for kind, rope in config.ropes.items() if rope is not None}


@pytest.mark.few(20)
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param(name, options, id=f"{name}-{number}")
        for name, several in MODELS.items()
        for number, options in enumerate(several)
    ],
)
def test_files_are_hfs_models(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(model_type, options)
    model.save_pretrained(tmp_path / "hf")
    Converter(model, tmp_path / "m.gguf").write()
    folder, file = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "m.gguf")
    assert file.names() == folder.names()
    for name in folder.names():
        assert file.shape(name) == folder.shape(name)
        np.testing.assert_allclose(file.read(name), folder.read(name), rtol=0, atol=2e-7, err_msg=name)
    hf, ours = Decoder.from_config(folder.config), Decoder.from_config(file.config, tensors=file)
    assert sorted(ours.source(file, np.float32).paths) == sorted(hf.source(folder, np.float32).paths)
    assert ours.config.sizes == hf.config.sizes
    for layer in range(hf.config.layers):
        assert ours.config.sizes_of(layer) == hf.config.sizes_of(layer)
    assert list(ours.config.windows) == list(hf.config.windows)
    if type(ours.config) is type(hf.config):  # mistral's file is llama's
        for field in {field.name for field in dataclasses.fields(hf.config)} - set(FORMS):
            assert getattr(ours.config, field) == pytest.approx(getattr(hf.config, field)), field
    for kind, expected in rotations(hf.config).items():
        np.testing.assert_allclose(rotations(ours.config)[kind], expected, rtol=1e-5, atol=2e-5)


class Fused(Converter):
    """Query, key and value rows in one tensor, and in blocks, as in files of the first GLM-4 and Phi."""

    def tensor(self, name: str, array: np.ndarray) -> None:
        if ".q_proj." in name:
            parts = [self.state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            fused, kind = np.concatenate(parts), Q.Q8_0 if array.ndim == 2 else Q.F32
            ours = f"blk.{name.split('.')[2]}.attn_qkv.{name.rpartition('.')[2]}"
            self.writer.add_tensor(ours, gguf.quantize(fused, kind), raw_dtype=kind)
        elif ".k_proj." not in name and ".v_proj." not in name:
            super().tensor(name, array)


@pytest.mark.parametrize("model_type", ["glm", "phi"])
def test_fused_rows_are_taken_apart(model_type: str, tmp_path: Path) -> None:
    model = random_model(
        model_type, MODELS[model_type][0] | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 256}
    )
    model.save_pretrained(tmp_path / "hf")
    Fused(model, tmp_path / "m.gguf").write()
    folder, file = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "m.gguf")
    assert file.names() == folder.names()
    assert file.config.get("attention_bias", True)
    for name in file.names():
        expected = folder.read(name)
        if re.search(r"[qkv]_proj.weight", name):
            expected = gguf.dequantize(gguf.quantize(expected, Q.Q8_0), Q.Q8_0)
        np.testing.assert_array_equal(file.read(name), expected, err_msg=name)
    Decoder.from_config(file.config, tensors=file).source(file, np.float32)


@pytest.mark.parametrize(
    ("model_type", "key", "add", "words"),
    [
        ("qwen2", "attention.sliding_window", 7, "legal is 0"),
        ("gpt2", "rope.freq_base", 500.0, "HF's gpt2 has nothing like it"),
        ("gpt2", "attention.head_count_kv", 2, "legal is the number of heads, 6"),
        ("bloom", "feed_forward_length", 90, "legal is four times the width, 192"),
        ("gpt_bigcode", "attention.head_count_kv", 4, "legal is 1"),
        ("mpt", "attention.max_alibi_bias", 4.0, "legal is 8.0"),
        ("olmo", "attention.layer_norm_epsilon", 0.1, "legal is 1e-05"),
        ("exaone4", "attention.sliding_window_pattern", [True], "legal is true or false for each of 5 layers"),
        ("phi", "rope.dimension_count", 7, "partial_rotary_factor"),
        ("falcon", "tensor_data_layout", "other", "legal is 'jploski'"),
        ("gemma4_text", "attention.head_count_kv", [1, 2], "one for each of 8 layers"),
        ("gemma4_text", "rope.dimension_count_swa", 6, "legal is the head size"),
        ("apertus", "xielu.beta", [0.5], "legal is a number for each of 2 layers"),
    ],
)
def test_refused(model_type: str, key: str, add: Any, words: str, tmp_path: Path) -> None:
    converter = Converter(random_model(model_type, MODELS[model_type][0]), tmp_path / "m.gguf")
    end = converter.writer.write_header_to_file

    def edited() -> None:
        named = key if key.startswith("xielu") else f"{converter.writer.arch}.{key}"
        converter.writer.kv_data[0].pop(named, None)
        kind = GGUFValueType.ARRAY if isinstance(add, list) else GGUFValueType.get_type(add)
        converter.writer.add_key_value(named, add, kind)
        end()

    converter.writer.write_header_to_file = edited
    converter.write()
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(words)):
        Decoder.from_config(open_checkpoint(tmp_path / "m.gguf").config)


@pytest.mark.parametrize("model_type", HF_READS)
def test_files_are_read_as_transformers_reads_them(model_type: str, tmp_path: Path) -> None:
    Converter(random_model(model_type, MODELS[model_type][-1]), tmp_path / "m.gguf").write()
    file = open_checkpoint(tmp_path / "m.gguf")
    _, theirs = transformers_reading(tmp_path / "m.gguf")
    assert len(theirs) > 10
    for name in file.names() & set(theirs):
        np.testing.assert_array_equal(file.read(name), theirs[name], err_msg=name)
    assert set(theirs) <= file.names()


def test_every_architecture_is_here() -> None:
    assert {architecture.model_type for architecture in ARCHITECTURES.values()} <= set(MODELS)


def test_tokenizer_of_gemma_4(tmp_path: Path) -> None:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<|tool>", "▁", "a", "b", "▁a", "ab", "▁ab", "\n", "\n\n"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    converter = Converter(random_model("gemma4_text", MODELS["gemma4_text"][0]), tmp_path / "m.gguf")
    writer = converter.writer
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list([*pieces, *bytes_])
    writer.add_token_scores([-1000.0] * (len(pieces) + 256))
    writer.add_token_types([3, 3, 3, 3, 4] + [1] * (len(pieces) - 5) + [6] * 256)
    writer.add_token_merges(["▁ a", "a b", "▁a b", "\n \n"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    converter.write()
    ours = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    architecture, keys, settings = get_gguf_tokenizer(str(tmp_path / "m.gguf"))
    hf, _ = convert_gguf_tokenizer(architecture, keys)
    assert not settings["add_bos_token"]
    for text in ("ab ab", " a  bab\n\n\na", "é<|tool>ab<eos>"):
        ids = hf.encode(text, add_special_tokens=False).ids
        assert ours(text)["input_ids"] == ids
        assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=False)
