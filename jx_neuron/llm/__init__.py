"""What a user holds: a decoder with its weights, made from a checkpoint, and asked for tokens or logits."""

from jx_neuron.llm.families import (
    GPT2ForSampling,
    GPT2ForSamplingWithContextBroadcasting,
    GPTJForSampling,
    LlamaForSampling,
    OPTForSampling,
)
from jx_neuron.llm.model import NeuronAutoModelForCausalLM

__all__ = [
    "GPT2ForSampling",
    "GPT2ForSamplingWithContextBroadcasting",
    "GPTJForSampling",
    "LlamaForSampling",
    "NeuronAutoModelForCausalLM",
    "OPTForSampling",
]
