"""Damaged config.json files beside sound weights: each is refused in this package's words, or gives what HF gives."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from mutations import damaged_json, limits
from test_families import OPTIONS, random_model
from tiny import CONFIGS, prompts, saved

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.errors import JxNeuronError

IDS = prompts(1, 5)
pytestmark = pytest.mark.filterwarnings("ignore:.*that HF does not read are ignored:UserWarning")
EXTRA = {  # what older files have beside what HF writes
    "gpt2": {"n_inner": None, "n_ctx": 96, "unknown": True},
    "gptj": {"rotary": True, "scale_attn_weights": True, "hidden_size": 48},
    "llama": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "original_max_position_embeddings": 48},
        "rope_theta": 10000.0,
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
    },
    "opt": {"learned_embeddings": True, "_remove_final_layer_norm": False},
}


def hf_logits(folder: Path) -> np.ndarray | None:
    """HF's, or None where it refuses what is read here."""
    try:
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        with torch.inference_mode():
            return hf(torch.from_numpy(IDS)).logits[0, -1].numpy()
    except Exception:  # of whatever kind
        return None


def fuzz(name: str, seeds: range, folder: Path) -> tuple[int, int]:
    """How many files were refused, and how many gave HF's logits; the others, which HF refuses, gave finite ones."""
    if name in EXTRA:
        config = json.loads((saved(name, folder) / "config.json").read_text()) | EXTRA[name]
        config.pop("rope_parameters", None)
    else:
        random_model(name, OPTIONS[name][0]).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    sound = NeuronAutoModelForCausalLM.from_pretrained(folder)
    logits = {repr(sound._origin.decoder.config): np.asarray(sound(IDS)[0])}  # all that bears on them
    plain = hf_logits(folder)
    assert plain is not None
    refused = right = 0  # right to 1e-3: some damage multiplies angles by 1e5, and their rounding with them
    for seed in seeds:
        (folder / "config.json").write_bytes(damaged_json(config, random.Random(seed)))
        try:
            with limits():
                model = NeuronAutoModelForCausalLM.from_pretrained(folder)
            key = repr(model._origin.decoder.config)
            ours = logits[key] if key in logits else logits.setdefault(key, np.asarray(model(IDS)[0]))
        except JxNeuronError:
            refused += 1
            continue
        theirs = hf_logits(folder)
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=f"seed {seed}")
            right += 1
        elif model._origin.decoder.config == sound._origin.decoder.config:  # HF dislikes a field of no account
            np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3, err_msg=f"seed {seed}")
        else:
            assert np.isfinite(ours).all(), f"seed {seed}"
    return refused, right


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "llama" else pytest.mark.slow) for n in CONFIGS])
def test_damaged_configs(name: str, tmp_path: Path) -> None:
    refused, right = fuzz(name, range(60), tmp_path)
    assert refused > 15
    assert right > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_thousand_damaged_configs(name: str, tmp_path: Path) -> None:
    refused, right = fuzz(name, range(60, 310), tmp_path)
    assert refused > 75
    assert right > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(EXTRA)))
def test_damaged_configs_of_every_family(name: str, tmp_path: Path) -> None:
    refused, right = fuzz(name, range(60), tmp_path)
    assert refused > 15
    assert right > 5
