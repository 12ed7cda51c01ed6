"""The user's model: a decoder with its weights, made from a checkpoint, and asked for tokens or logits."""

from jx_neuron.llm.families import (
    BloomForSampling,
    GPT2ForSampling,
    GPT2ForSamplingWithContextBroadcasting,
    GPTJForSampling,
    GPTNeoXForSampling,
    LlamaForSampling,
    MistralForSampling,
    OPTForSampling,
)
from jx_neuron.llm.loading import generate, load
from jx_neuron.llm.model import NeuronAutoModelForCausalLM

AutoModelForCausalLM = NeuronAutoModelForCausalLM
"""The same class under HF's name."""

__all__ = [
    "AutoModelForCausalLM",
    "BloomForSampling",
    "GPT2ForSampling",
    "GPT2ForSamplingWithContextBroadcasting",
    "GPTJForSampling",
    "GPTNeoXForSampling",
    "LlamaForSampling",
    "MistralForSampling",
    "NeuronAutoModelForCausalLM",
    "OPTForSampling",
    "generate",
    "load",
]
