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
from jx_neuron.llm.model import NeuronAutoModelForCausalLM

__all__ = [
    "BloomForSampling",
    "GPT2ForSampling",
    "GPT2ForSamplingWithContextBroadcasting",
    "GPTJForSampling",
    "GPTNeoXForSampling",
    "LlamaForSampling",
    "MistralForSampling",
    "NeuronAutoModelForCausalLM",
    "OPTForSampling",
]
