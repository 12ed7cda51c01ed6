"""Decoder language models in JAX, lowered to AWS Trainium and Inferentia, and run on any CPU."""

import sys
from typing import TYPE_CHECKING

from jx_neuron.util import lazy as _lazy

__version__ = "0.1.0"

_WITH_TORCH = "HuggingFaceGenerationModelAdapter"  # not among what `import *` brings
__getattr__, _names, __all__ = _lazy.exports(
    __name__,
    {
        "config": "ContinuousBatchingConfig GQA GenerationConfig KVCacheQuantizationConfig NeuronConfig "
        "QuantizationConfig",
        "engine.answer": "Step",
        "engine.generation": "Answer Generation",
        "engine.options": "SamplingParams",
        "engine.ticket": "Event",
        "engine.scoring": "Score",
        "errors": "InputError JxNeuronError",
        "integrations.hf_generate": _WITH_TORCH,
        "llm": "AutoModelForCausalLM BloomForSampling GPT2ForSampling GPT2ForSamplingWithContextBroadcasting "
        "GPTJForSampling GPTNeoXForSampling LlamaForSampling MistralForSampling NeuronAutoModelForCausalLM "
        "OPTForSampling generate load",
        "models": "model_types register",
        "nn.sharding": "request_devices",
    },
)
__all__ = ["__version__", *(name for name in __all__ if name != _WITH_TORCH)]  # noqa: PLE0604

if TYPE_CHECKING:
    from jx_neuron.config import (
        GQA,
        ContinuousBatchingConfig,
        GenerationConfig,
        KVCacheQuantizationConfig,
        NeuronConfig,
        QuantizationConfig,
    )
    from jx_neuron.engine.answer import Step
    from jx_neuron.engine.generation import Answer, Generation
    from jx_neuron.engine.options import SamplingParams
    from jx_neuron.engine.scoring import Score
    from jx_neuron.engine.ticket import Event
    from jx_neuron.errors import InputError, JxNeuronError
    from jx_neuron.integrations.hf_generate import HuggingFaceGenerationModelAdapter
    from jx_neuron.llm import (
        AutoModelForCausalLM,
        BloomForSampling,
        GPT2ForSampling,
        GPT2ForSamplingWithContextBroadcasting,
        GPTJForSampling,
        GPTNeoXForSampling,
        LlamaForSampling,
        MistralForSampling,
        NeuronAutoModelForCausalLM,
        OPTForSampling,
        generate,
        load,
    )
    from jx_neuron.models import model_types, register
    from jx_neuron.nn.sharding import request_devices


def __dir__() -> list[str]:
    return [*__all__, _WITH_TORCH]


sys.meta_path.append(
    _lazy.Moved(
        {
            f"jx_neuron.{former}": f"jx_neuron.{present}"
            for former, present in (
                ("cache", "nn.state"),
                ("demo", "checkpoint.demo"),
                ("evaluation", "integrations.lm_eval"),
                ("generation", "engine"),
                ("generation.hf", "integrations.hf_generate"),
                ("generation.options", "engine.options"),
                ("hf_config", "checkpoint.hf_config"),
                ("lowering.buckets", "step.buckets"),
                ("lowering.step", "step.step"),
                ("modeling", "llm"),
                ("rope", "nn.rope"),
                ("sharding", "nn.sharding"),
                ("testing", "integrations.parity"),
                ("weights", "checkpoint.weights"),
            )
        }
    )
)
