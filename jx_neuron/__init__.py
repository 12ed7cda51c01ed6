"""Decoder language models in JAX, lowered to AWS Trainium and Inferentia, and run on any CPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that holds it; read on first use, so that importing jx_neuron is quick
_HOMES = {
    "GPT2ForSampling": "modeling",
    "GPT2ForSamplingWithContextBroadcasting": "modeling",
    "GPTJForSampling": "modeling",
    "LlamaForSampling": "modeling",
    "NeuronAutoModelForCausalLM": "modeling",
    "OPTForSampling": "modeling",
    "GQA": "config",
    "GenerationConfig": "config",
    "NeuronConfig": "config",
    "InputError": "errors",
    "Score": "generation.scoring",
    "Step": "generation.answer",
    "JxNeuronError": "errors",
    "model_types": "models",
    "register": "models",
    "request_devices": "sharding",
}
_WITH_TORCH = {"HuggingFaceGenerationModelAdapter": "generation.hf"}  # not among what `import *` brings

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604

if TYPE_CHECKING:
    from jx_neuron.config import GQA, GenerationConfig, NeuronConfig
    from jx_neuron.errors import InputError, JxNeuronError
    from jx_neuron.generation.answer import Step
    from jx_neuron.generation.hf import HuggingFaceGenerationModelAdapter
    from jx_neuron.generation.scoring import Score
    from jx_neuron.modeling import (
        GPT2ForSampling,
        GPT2ForSamplingWithContextBroadcasting,
        GPTJForSampling,
        LlamaForSampling,
        NeuronAutoModelForCausalLM,
        OPTForSampling,
    )
    from jx_neuron.models import model_types, register
    from jx_neuron.sharding import request_devices


def __getattr__(name: str) -> Any:
    homes = _HOMES | _WITH_TORCH
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *_WITH_TORCH]
