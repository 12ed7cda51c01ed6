"""The checkpoints known by name: read without a network, and of the sizes that are published."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jx_neuron.errors import CheckpointError
from jx_neuron.models import family
from jx_neuron.models.known import KNOWN, config_of
from jx_neuron.models.registry import FAMILIES
from jx_neuron.planning.outline import Outline

# parameters counted in the tensors of a checkpoint on the Hub, or millions (m) or billions (b) of a card or paper
PUBLISHED: dict[str, int | str] = {
    "swiss-ai/Apertus-8B-2509": "8.05b",
    "swiss-ai/Apertus-70B-2509": "70.6b",
    "arcee-ai/AFM-4.5B": "4.62b",
    "arcee-ai/AFM-4.5B-Base": "4.62b",
    "bigscience/bloom-560m": 559214592,
    "bigscience/bloom-1b1": 1065314304,
    "bigscience/bloom-1b7": 1722408960,
    "bigscience/bloom-3b": 3002557440,
    "bigscience/bloom-7b1": 7069016064,
    "bigscience/bloom": 176247271424,
    "Salesforce/codegen-350M-mono": "0.35b",
    "Salesforce/codegen-2B-mono": "2.7b",
    "Salesforce/codegen-6B-mono": "7.1b",  # by the size of its file; its layers are 6b
    "Salesforce/codegen-16B-mono": "16.1b",
    "CohereLabs/aya-23-8B": "8.03b",
    "CohereLabs/c4ai-command-r-v01": "35.0b",
    "CohereLabs/c4ai-command-r-plus": "104b",
    "CohereLabs/c4ai-command-r7b-12-2024": "8.03b",
    "CohereLabs/c4ai-command-a-03-2025": "111b",
    "deepseek-ai/DeepSeek-V2-Lite": "15.7b",
    "deepseek-ai/DeepSeek-V2": "236b",
    "deepseek-ai/DeepSeek-V3": "671b",
    "baidu/ERNIE-4.5-0.3B-PT": "0.36b",
    "baidu/ERNIE-4.5-21B-A3B-PT": "21b",
    "LGAI-EXAONE/EXAONE-4.0-1.2B": "1.28b",
    "LGAI-EXAONE/EXAONE-4.0-32B": "32.0b",
    "tiiuae/falcon-rw-1b": "1.31b",
    "tiiuae/falcon-rw-7b": "7.5b",
    "tiiuae/falcon-7b": "7b",
    "tiiuae/falcon-11B": "11.1b",
    "tiiuae/falcon-40b": "42b",
    "google/gemma-2b": 2506172416,
    "google/gemma-7b": 8537680896,
    "google/gemma-2-2b": 2614341888,
    "google/gemma-2-9b": 9241705984,
    "google/gemma-2-27b": 27227128320,
    "google/gemma-3-270m": 268098176,
    "google/gemma-3-1b-it": 999885952,
    "google/gemma-3-4b-it": "3.88b",
    "google/gemma-3-12b-it": "11.8b",
    "google/gemma-3-27b-it": "27.0b",
    "google/gemma-4-31B-it": "30.7b",
    "THUDM/glm-4-9b-hf": "9.40b",
    "THUDM/GLM-4-9B-0414": "9.40b",
    "THUDM/GLM-4-32B-0414": "32.6b",
    "zai-org/GLM-4.5-Air": "106b",
    "zai-org/GLM-4.5": "353b",  # of its 92 layers; the card says 355b
    "meta-llama/Llama-4-Scout-17B-16E": "108b",  # of its text model; the card says 109b
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": "401b",
    "gpt2": 124439808,
    "gpt2-medium": "355m",
    "gpt2-large": "774m",
    "gpt2-xl": 1557611200,
    "bigcode/tiny_starcoder_py": "164m",
    "bigcode/gpt_bigcode-santacoder": "1.1b",
    "bigcode/starcoder": "15.5b",
    "EleutherAI/gpt-neo-125m": "125m",
    "EleutherAI/gpt-neo-1.3B": "1.3b",
    "EleutherAI/gpt-neo-2.7B": "2.7b",
    "EleutherAI/pythia-70m": 70426624,
    "EleutherAI/pythia-160m": 162322944,
    "EleutherAI/pythia-410m": 405334016,
    "EleutherAI/pythia-1b": 1011781632,
    "EleutherAI/pythia-1.4b": 1414647808,
    "EleutherAI/pythia-2.8b": 2775208960,
    "EleutherAI/pythia-6.9b": 6857302016,
    "EleutherAI/pythia-12b": 11846072320,
    "EleutherAI/gpt-neox-20b": 20554567680,
    "EleutherAI/gpt-j-6B": 6050882784,
    "openai/gpt-oss-20b": "20.9b",
    "openai/gpt-oss-120b": "116.8b",
    "ibm-granite/granite-3.0-2b-base": "2.5b",
    "ibm-granite/granite-3.0-8b-base": "8.1b",
    "ibm-granite/granite-3.3-8b-instruct": "8.17b",
    "ibm-granite/granite-4.1-3b": "3b",
    "ibm-granite/granite-4.1-8b": "8b",
    "ibm-granite/granite-4.1-30b": "29b",
    "ibm-granite/granite-3.0-1b-a400m-base": "1.3b",
    "kyutai/helium-1-preview-2b": "2b",
    "tencent/Hunyuan-0.5B-Instruct": "0.5b",
    "tencent/Hunyuan-1.8B-Instruct": "1.8b",
    "tencent/Hunyuan-4B-Instruct": "4b",
    "tencent/Hunyuan-7B-Instruct": "7.5b",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1100048384,
    "meta-llama/Llama-2-7b-hf": 6738415616,
    "meta-llama/Llama-2-13b-hf": 13015864320,
    "meta-llama/Llama-2-70b-hf": 68976648192,
    "codellama/CodeLlama-7b-hf": 6738546688,
    "codellama/CodeLlama-13b-hf": 13016028160,
    "codellama/CodeLlama-34b-hf": 33743970304,
    "meta-llama/Meta-Llama-3-8B": 8030261248,
    "meta-llama/Meta-Llama-3-70B": 70553706496,
    "meta-llama/Llama-3.2-1B": 1235814400,
    "meta-llama/Llama-3.2-3B": 3212749824,
    "meta-llama/Llama-3.1-8B": 8030261248,
    "meta-llama/Llama-3.1-70B": 70553706496,
    "meta-llama/Llama-3.1-405B": 405853388800,
    "HuggingFaceTB/SmolLM2-135M": 134515008,
    "HuggingFaceTB/SmolLM2-360M": 361821120,
    "HuggingFaceTB/SmolLM2-1.7B": 1711376384,
    "tiiuae/Falcon3-1B-Base": 1669408768,
    "tiiuae/Falcon3-3B-Base": 3227655168,
    "tiiuae/Falcon3-7B-Base": 7455550464,
    "tiiuae/Falcon3-10B-Base": 10305653760,
    "mistralai/Ministral-3-3B-Base-2512": "3.4b",
    "mistralai/Ministral-3-8B-Base-2512": "8.4b",
    "mistralai/Ministral-3-14B-Base-2512": "13.5b",
    "mistralai/Mistral-7B-v0.1": 7241732096,
    "mistralai/Mistral-7B-v0.3": 7248023552,
    "mistralai/Ministral-8B-Instruct-2410": 8019808256,
    "mistralai/Mistral-Nemo-Base-2407": 12247782400,
    "mistralai/Codestral-22B-v0.1": "22.2b",
    "mistralai/Mistral-Small-24B-Base-2501": 23572403200,
    "mistralai/Mistral-Large-Instruct-2407": "123b",
    "MiniMaxAI/MiniMax-M2": "229b",
    "mistralai/Mixtral-8x7B-v0.1": 46702792704,
    "mistralai/Mixtral-8x22B-v0.1": "141b",
    "mistralai/Mixtral-8x22B-Instruct-v0.1": "141b",
    "mosaicml/mpt-7b": "6.7b",
    "mosaicml/mpt-30b": "29.95b",
    "nanochat-students/nanochat-d20": "561m",
    "karpathy/nanochat-d32": "1.9b",
    "nvidia/Minitron-4B-Base": "4.19b",
    "nvidia/Minitron-8B-Base": "8.27b",
    "allenai/OLMo-1B-hf": "1.18b",
    "allenai/OLMo-7B-hf": "6.9b",
    "allenai/OLMo-2-0425-1B": "1.48b",
    "allenai/OLMo-2-1124-7B": "7.3b",
    "allenai/OLMo-2-1124-13B": "13.7b",
    "allenai/OLMo-2-0325-32B": "32.2b",
    "allenai/Olmo-3-1025-7B": "7.3b",
    "allenai/Olmo-3-1125-32B": "32.2b",
    "allenai/OLMoE-1B-7B-0924": "6.92b",
    "facebook/opt-125m": 125239296,
    "facebook/opt-1.3b": "1.3b",
    "facebook/opt-2.7b": "2.7b",
    "facebook/opt-6.7b": "6.7b",
    "facebook/opt-13b": "13b",
    "facebook/opt-30b": "30b",
    "facebook/opt-66b": "66b",
    "microsoft/phi-1_5": 1418270720,
    "microsoft/phi-2": 2779683840,
    "microsoft/Phi-3-mini-4k-instruct": 3821079552,
    "microsoft/Phi-3-medium-4k-instruct": 13960238080,
    "microsoft/phi-4": 14659507200,
    "microsoft/Phi-4-mini-instruct": 3836021760,
    "Qwen/Qwen2.5-0.5B": 494032768,
    "Qwen/Qwen2.5-1.5B": 1543714304,
    "Qwen/Qwen2.5-3B": 3085938688,
    "Qwen/Qwen2.5-7B": 7615616512,
    "Qwen/Qwen2.5-14B": 14770033664,
    "Qwen/Qwen2.5-32B": 32763876352,
    "Qwen/Qwen2.5-72B": 72706203648,
    "Qwen/Qwen1.5-MoE-A2.7B": "14.3b",
    "Qwen/Qwen3-0.6B": 596049920,
    "Qwen/Qwen3-1.7B": 1720574976,
    "Qwen/Qwen3-4B": 4022468096,
    "Qwen/Qwen3-8B": 8190735360,
    "Qwen/Qwen3-14B": 14768307200,
    "Qwen/Qwen3-32B": 32762123264,
    "Qwen/Qwen3-30B-A3B": "30.5b",
    "Qwen/Qwen3-235B-A22B": "235b",
    "ByteDance-Seed/Seed-OSS-36B-Base": 36151104512,
    "HuggingFaceTB/SmolLM3-3B": 3075098624,
    "stabilityai/stablelm-2-1_6b": 1644515328,
    "stabilityai/stablelm-3b-4e1t": 2795443200,
    "stabilityai/stablelm-2-12b": "12.1b",
    "bigcode/starcoder2-3b": 3030371328,
    "bigcode/starcoder2-7b": 7173923840,
    "bigcode/starcoder2-15b": 15957889024,
    "LiquidAI/LFM2-350M": 354483968,
    "LiquidAI/LFM2-700M": 742489344,
    "LiquidAI/LFM2-1.2B": 1170340608,
    "AntonV/mamba2-130m-hf": "0.13b",
    "AntonV/mamba2-370m-hf": "0.37b",
    "AntonV/mamba2-780m-hf": "780m",
    "AntonV/mamba2-1.3b-hf": "1.3b",
    "AntonV/mamba2-2.7b-hf": "2.7b",
    "mistralai/Mamba-Codestral-7B-v0.1": 7285403648,
    "tiiuae/Falcon-H1-0.5B-Instruct": 521411104,
    "ibm-granite/granite-4.0-h-micro": "3b",
    "ibm-granite/granite-4.0-h-tiny": "7b",
    "ibm-granite/granite-4.0-h-small": "32b",
    "LiquidAI/LFM2-8B-A1B": "8.3b",
    "Qwen/Qwen3.5-0.8B": "0.8b",
    "Qwen/Qwen3.5-9B": "9b",
    "Qwen/Qwen3.5-27B": "27b",
    "Qwen/Qwen3.5-35B-A3B": "35b",
    "Qwen/Qwen3.5-122B-A10B": "122b",
    "Qwen/Qwen3.5-397B-A17B": "397b",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "80b",
}
# families whose layers are not alike
DIFFER = set(
    "deepseek_v2 deepseek_v3 ernie4_5_moe gemma4_text glm4_moe granitemoehybrid lfm2 lfm2_moe llama4_text "
    "qwen3_5_moe_text qwen3_5_text qwen3_next".split()
)
LAYERS = {"n_layer", "n_layers", "num_hidden_layers"}


def parameters(config: dict[str, Any]) -> int:
    """Of a decoder, those that a checkpoint has; all layers have the same shapes, but for those of `DIFFER`."""

    def count(**layers: int) -> int:
        parameters = Outline.of(config | layers).parameters(1)
        return sum(p.elements for p in parameters if not p.is_computed)

    (name,) = LAYERS & set(config) or [None]
    if name is None or config["model_type"] in DIFFER:
        return count()
    one, two = count(**{name: 1}), count(**{name: 2})
    return one + (config[name] - 1) * (two - one)


SLOW = {name for name in PUBLISHED if KNOWN[name]["model_type"] in DIFFER | {"mamba2"}} - {"LiquidAI/LFM2-350M"}


@pytest.mark.few(16)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in PUBLISHED]
)
def test_parameters_are_as_many_as_published(name: str) -> None:
    count, published = parameters(KNOWN[name]), PUBLISHED[name]
    if isinstance(published, int):
        assert count == published
    else:
        digits = len(published.partition(".")[2]) - 1 if "." in published else 0
        unit = {"m": 10**6, "b": 10**9}[published[-1]] / 10**digits
        assert math.isclose(count, float(published[:-1]) * unit * 10**digits, abs_tol=unit)


def test_every_checkpoint_has_the_size_of_one_that_is_published() -> None:
    """The sizes of a model are those of its family's Config."""

    def sizes(name: str) -> tuple[Any, ...]:
        config = family(KNOWN[name]["model_type"]).Config.from_hf(KNOWN[name])
        return config.MODEL_TYPE, config.layers, *sorted(config.sizes.items())

    published = {sizes(name) for name in PUBLISHED}
    assert [name for name in KNOWN if sizes(name) not in published] == []


# parameters of which a token has, by a card or paper, in billions
ACTIVE = {
    "openai/gpt-oss-20b": 3.6,
    "openai/gpt-oss-120b": 5.1,
    "mistralai/Mixtral-8x7B-v0.1": 12.9,
    "allenai/OLMoE-1B-7B-0924": 1.3,
    "Qwen/Qwen3-30B-A3B": 3.3,
    "deepseek-ai/DeepSeek-V2-Lite": 2.4,
    "LiquidAI/LFM2-8B-A1B": 1.5,
    "Qwen/Qwen3.5-35B-A3B": 3.0,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in ACTIVE]
)
def test_active_parameters_are_as_many_as_published(name: str) -> None:
    outline = Outline.of(KNOWN[name])
    embedding = min(p.elements for p in outline.parameters(1) if p.is_vocabulary_table)
    counts = outline.active_parameter_count, outline.active_parameter_count - embedding  # some count no embedding
    assert any(math.isclose(count, 1e9 * ACTIVE[name], abs_tol=0.1e9) for count in counts)


def test_names_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert config_of("openai-community/gpt2-xl") == config_of("GPT2-XL") == KNOWN["gpt2-xl"]
    with pytest.raises(CheckpointError, match="no such folder or file"):
        config_of("./nowhere/config.json")


def test_a_path_comes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(KNOWN["gpt2"] | {"n_layer": 2}))
    assert config_of("gpt2") == KNOWN["gpt2"] | {"n_layer": 2}


def test_every_family_is_known_by_the_name_of_a_checkpoint() -> None:
    ours = {name for name, entry in FAMILIES.items() if isinstance(entry, str)}
    no_file_at_hand = {"phimoe"}
    assert {config["model_type"] for config in KNOWN.values()} == ours - no_file_at_hand
