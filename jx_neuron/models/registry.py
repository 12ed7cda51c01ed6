"""The decoder families by HF's model_type."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.row import Tensors, W
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models import wrapper


class Family(Protocol):
    """The contents of a model file."""

    Config: type[HFConfig]
    Model: type[Any]
    WEIGHTS: Sequence[W]
    IGNORE: Sequence[str | Copy]


FAMILIES: dict[str, Family | str] = {
    name: f"jx_neuron.models.{name}"
    for name in (
        "apertus arcee bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 "
        "falcon falcon_h1 gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo "
        "gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan_v1_dense lfm2 lfm2_moe "
        "llama llama4_text mamba2 minimax_m2 ministral3 mistral mixtral mpt nanochat nemotron olmo olmo2 "
        "olmo3 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe "
        "qwen3_next seed_oss smollm3 stablelm starcoder2"
    ).split()
}


# multimodal models, and the model types of the text models within them, the usual first
TEXT_MODELS: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "llama4": ("llama4_text",),
    "mistral3": ("mistral", "ministral3"),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}


def model_types() -> list[str]:
    """The model types that can be loaded."""
    return sorted(FAMILIES)


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parsed config.json, or of a multimodal model that of its text model, with a warning of what is left out."""
    if (legal := TEXT_MODELS.get(str(raw.get("model_type")))) is None:
        return raw
    config = wrapper.text_config(raw, legal)
    wrapper.warn(raw, config, (key for key in raw if key.endswith("_config") and key != "text_config"))
    return config


def text_model(raw: Mapping[str, Any], tensors: Tensors, *, alone: bool = True) -> tuple[Mapping[str, Any], Tensors]:
    """A parsed config.json and a checkpoint's tensors, or of a multimodal model those of its text model.

    alone: whether the rest is left out, of which a warning tells.
    """
    if (legal := TEXT_MODELS.get(str(raw.get("model_type")))) is None:
        return raw, tensors
    text = wrapper.TextTensors.of(tensors)
    config = wrapper.text_config(raw, legal, text.names())
    if alone:
        wrapper.warn(raw, config, text.others)
    return config, text


def family(model_type: str) -> Family:
    """The family of an HF model_type. Raises ConfigError that lists those known."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(model_types())}, and of "
            f"{', '.join(TEXT_MODELS)} the text models. "
            "A decoder of your own is added with jx_neuron.register()"
        )
    entry = FAMILIES[model_type]
    return cast(Family, import_module(entry)) if isinstance(entry, str) else entry


def add(model_type: str, family: Family) -> None:
    """Makes a family known, or replaces one."""
    FAMILIES[model_type] = family
