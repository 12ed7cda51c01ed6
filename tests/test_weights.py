"""Configs held against the tensors that are there, before a model is built; and what of a checkpoint HF drops."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import transformers
from checkpoints import write_gguf
from mutations import limits
from tiny import CONFIGS, greedy, model, prompts, saved

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.errors import CheckpointError, ConfigError, JxNeuronError
from jx_neuron.util.arguments import shown

LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "llama": "num_hidden_layers", "opt": "num_hidden_layers"}
SIZES = {
    "gpt2": "n_embd n_head n_inner n_positions vocab_size",
    "gptj": "n_embd n_head n_inner vocab_size rotary_dim",
    "llama": "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size",
    "opt": "hidden_size num_attention_heads ffn_dim max_position_embeddings vocab_size word_embed_proj_dim",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


def refusal(folder: Path, to: Path, fields: dict[str, Any]) -> JxNeuronError:
    """Of the checkpoint with `fields` in its config.json."""
    for path in folder.iterdir():
        if not (to / path.name).exists():
            (to / path.name).symlink_to(path)
    (to / "config.json").unlink()
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))
    with limits(), pytest.raises(JxNeuronError) as caught:
        NeuronAutoModelForCausalLM.from_pretrained(to)
    return caught.value


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_are_not_there(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for layers in (3, 500):
        error = refusal(folders[name], tmp_path, {LAYERS[name]: layers})
        assert isinstance(error, CheckpointError)
        assert f"the config calls for {layers} layers and the checkpoint has 2" in str(error)
    for layers in (501, 10**9, 2**31 - 1, 10**50):
        error = refusal(folders[name], tmp_path, {LAYERS[name]: layers})
        assert isinstance(error, ConfigError)
    error = refusal(folders[name], tmp_path, {LAYERS[name]: 1})
    assert re.search(r"holds tensors \S+\.1\.\S+, .* which no parameter takes", str(error))


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in SIZES for field in SIZES[name].split()])
def test_sizes_that_are_not_there(name: str, field: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Whatever size is claimed: the message names the field, or the tensor that has another."""
    size = getattr(CONFIGS[name](), field) or 192
    more = 5 if "head" in field else 2  # twice as many heads are another model of the same tensors
    for claimed in (more * size, 2**31 - 1 - (2**31 - 1) % size, 2**40, 10**50):
        message = str(refusal(folders[name], tmp_path, {field: claimed}))
        if claimed < 2**31:
            assert re.search(
                rf"tensor \S+ has shape .* calls for|{field}={claimed}|by {field}|is not divisible", message
            ), message
        else:
            assert f"{field}={shown(claimed)} should be a number from 1 to 2147483647" in message


def test_a_headless_checkpoint_too(folders: dict[str, Path], tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(folders["opt"])
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "changed").mkdir()
    error = refusal(tmp_path / "base", tmp_path / "changed", {"num_hidden_layers": 400})
    assert "calls for 400 layers and the checkpoint has 2" in str(error)


@pytest.mark.parametrize(
    ("key", "claimed"),
    [
        ("block_count", 400),
        ("block_count", 2**31),
        ("embedding_length", 2**31 - 64),
        ("feed_forward_length", 2**31),
        ("head_count", 2**30),
        ("head_count_kv", 2**30),
        ("context_length", 2**32 - 1),
        ("vocab_size", 2**31 - 1),
    ],
)
def test_gguf_metadata_too(key: str, claimed: int, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        getattr(writer, f"add_{key}")(claimed)

    path = write_gguf(tmp_path / "x.gguf", skip=(key,), edit=edit)
    with limits(), pytest.raises(JxNeuronError):
        NeuronAutoModelForCausalLM.from_pretrained(path)


BUFFERS = {
    "gpt2": ["transformer.h.0.attn.bias", "h.1.attn.masked_bias", "transformer.h.1.crossattention.bias"],
    "gptj": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "llama": ["model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"],
    "opt": ["model.decoder.version", "decoder.version"],
}


def with_tensors(folder: Path, to: Path, tensors: dict[str, np.ndarray], without: str = "\0") -> Path:
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    held = {name: array for name, array in held.items() if without not in name}
    safetensors.numpy.save_file(held | tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.few(1)
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_hf_drops(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_tensors(folders[name], tmp_path, {buffer: np.ones(3, np.float32) for buffer in BUFFERS[name]})
    hf, ids = transformers.AutoModelForCausalLM.from_pretrained(folder), prompts(1, 4)
    np.testing.assert_array_equal(
        NeuronAutoModelForCausalLM.from_pretrained(folder).sample(ids, sequence_length=12, top_k=1), greedy(hf, ids, 12)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_what_hf_says_that_it_drops_is_dropped(name: str) -> None:
    for pattern in type(model(name))._keys_to_ignore_on_load_unexpected or ():
        assert any(re.search(pattern, buffer) for buffer in BUFFERS[name])


def test_other_tensors_are_not_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_tensors(folders["llama"], tmp_path, {"model.decoder.version": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"holds tensor model\.decoder\.version, which no parameter takes"):
        NeuronAutoModelForCausalLM.from_pretrained(folder)


def test_a_copy_without_its_original(folders: dict[str, Path], tmp_path: Path) -> None:
    head = {"lm_head.weight": np.ones((101, 48), np.float32)}
    folder = with_tensors(folders["gpt2"], tmp_path, head, without="wte")
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks tensor transformer\.wte\.weight"):
        NeuronAutoModelForCausalLM.from_pretrained(folder)
