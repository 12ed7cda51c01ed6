"""Multimodal models of HF: their text model is loaded, and gives HF's logits for text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from families_f1 import LLAMA, YARN
from families_recurrent import QWEN3_5, QWEN_MOE

from jx_neuron import MistralForSampling, NeuronAutoModelForCausalLM, NeuronConfig, SamplingParams
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.integrations.hf_generate import HuggingFaceGenerationModelAdapter
from jx_neuron.integrations.parity import parity
from jx_neuron.models.registry import TEXT_MODELS
from jx_neuron.planning.plan import plan

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "patch_size": 14}
PIXTRAL = VISION | {"model_type": "pixtral", "patch_size": 14, "head_dim": 8}
GEMMA = LLAMA | {
    "head_dim": 20,
    "num_hidden_layers": 3,
    "sliding_window": 7,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}
BETA = {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 16}}
GEMMA4 = LLAMA | {
    "head_dim": 12,
    "global_head_dim": 20,
    "hidden_size_per_layer_input": 10,
    "vocab_size_per_layer_input": 101,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 7,
    "pad_token_id": 0,
}
GEMMA4_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": 48,
}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {"text_config": GEMMA, "vision_config": SIGLIP, "mm_tokens_per_image": 4}),
    "gemma3-untied": ("gemma3", {"text_config": GEMMA, "vision_config": SIGLIP, "tie_word_embeddings": False}),
    "gemma4": ("gemma4", {"text_config": GEMMA4, "vision_config": GEMMA4_VISION}),
    "mistral3": (
        "mistral3",
        {"text_config": LLAMA | {"model_type": "mistral", "sliding_window": None}, "vision_config": PIXTRAL},
    ),
    "mistral3-untied": (
        "mistral3",
        {
            "text_config": LLAMA | BETA | {"model_type": "ministral3", "head_dim": 20},
            "vision_config": PIXTRAL,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": ("qwen3_5", {"text_config": QWEN3_5, "vision_config": QWEN_VISION}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": QWEN_MOE, "vision_config": QWEN_VISION}),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [90, 3, 4]]
LEFT_OUT = r"left out: .*(\w+, vision_tower|visual)"
QUICK = ("gemma3", "mistral3-untied")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in WRAPPERS]


def random_model(name: str) -> Any:
    model_type, options = WRAPPERS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    model.set_experts_implementation("eager")  # others take no widths that are odd
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5)
    return model


@pytest.fixture(scope="module", params=CASES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = random_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.few(1)
def test_parity(original: tuple[Any, Path]) -> None:
    model, folder = original
    with pytest.warns(UserWarning, match=rf"is loaded as its text model, \w+, which takes text alone; {LEFT_OUT}"):
        result = parity(model, lengths=(20, 7, 1))
    assert result.worst < 1e-4, result
    assert result.first_difference is None
    with pytest.warns(UserWarning, match=LEFT_OUT):
        tensor_parallel = parity(folder, tp_degree=4)
    assert tensor_parallel.worst < 1e-4


def load(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    with pytest.warns(UserWarning, match=LEFT_OUT):
        return NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=64, batch_size=2, **options)


@pytest.mark.slow
def test_generate_saved_and_hf(original: tuple[Any, Path], tmp_path: Path) -> None:
    hf, folder = original
    expected = [
        hf.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    model = load(folder)
    assert model.config["model_type"] in {legal for several in TEXT_MODELS.values() for legal in several}
    greedy = SamplingParams(max_tokens=9, eos_token_id=-1)
    assert [list(answer.ids) for answer in model.generate(PROMPTS, greedy)] == expected
    adapter = HuggingFaceGenerationModelAdapter(transformers.AutoConfig.from_pretrained(folder), model)
    ids = torch.tensor(PROMPTS[:1])
    assert adapter.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 12:].tolist() == expected[0]
    saved = load(folder, backend="host").save(tmp_path / "saved", sharded_weights=True)
    again = NeuronAutoModelForCausalLM.from_pretrained(saved)
    assert [list(answer.ids) for answer in again.generate(PROMPTS, greedy)] == expected


def test_names_of_older_checkpoints(original: tuple[Any, Path], tmp_path: Path) -> None:
    hf, folder = original
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for there, here in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if any(name.startswith(there) for name in tensors):
            tensors = {here + n.removeprefix(there) if n.startswith(there) else n: t for n, t in tensors.items()}
        else:
            tensors = {there + n.removeprefix(here) if n.startswith(here) else n: t for n, t in tensors.items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    ids = np.array(PROMPTS[:1])
    options = {"neuron_config": NeuronConfig(output_all_logits=True)}
    with torch.inference_mode():
        expected = hf(torch.tensor(PROMPTS[:1])).logits.numpy()
    for path in (folder, tmp_path):
        np.testing.assert_allclose(load(path, **options)(ids), expected, atol=1e-4)


def test_config_alone(original: tuple[Any, Path]) -> None:
    raw = json.loads((original[1] / "config.json").read_text())
    with pytest.warns(UserWarning, match="left out: .*vision_config"):
        result = plan(raw)
    assert result.model_type == load(original[1]).config["model_type"]
    with pytest.warns(UserWarning, match="left out: .*vision_config"):
        model = NeuronAutoModelForCausalLM.from_config(raw, n_positions=64)
    model.lowered().check("trn1")
    if raw["model_type"] == "mistral3" and raw["text_config"]["model_type"] == "mistral":
        with pytest.warns(UserWarning, match="vision_config"):
            assert MistralForSampling.from_config(raw, n_positions=64).settings.model_type == "mistral"


def test_refused(original: tuple[Any, Path], tmp_path: Path) -> None:
    raw = json.loads((original[1] / "config.json").read_text())
    for text in (None, 3, raw["text_config"] | {"model_type": "llama"}):
        with pytest.raises(ConfigError, match=r"text_config=.* is not supported; legal is an object of model_type"):
            NeuronAutoModelForCausalLM.from_config(raw | {"text_config": text})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file({"vision_tower.x": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="vision_tower"), pytest.raises(CheckpointError, match="lacks"):
        NeuronAutoModelForCausalLM.from_pretrained(tmp_path)
