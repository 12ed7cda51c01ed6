"""`NeuronAutoModelForCausalLM` by family: the classes of transformers-neuronx, each of one model_type."""

from jx_neuron.llm.model import NeuronAutoModelForCausalLM


class BloomForSampling(NeuronAutoModelForCausalLM):
    """BLOOM."""

    MODEL_TYPE = "bloom"


class GPT2ForSampling(NeuronAutoModelForCausalLM):
    """GPT-2."""

    MODEL_TYPE = "gpt2"


class GPTJForSampling(NeuronAutoModelForCausalLM):
    """GPT-J."""

    MODEL_TYPE = "gptj"


class GPTNeoXForSampling(NeuronAutoModelForCausalLM):
    """GPT-NeoX and Pythia."""

    MODEL_TYPE = "gpt_neox"


class LlamaForSampling(NeuronAutoModelForCausalLM):
    """Llama, and what shares its architecture: CodeLlama, SmolLM2, and others of model_type llama."""

    MODEL_TYPE = "llama"


class MistralForSampling(NeuronAutoModelForCausalLM):
    """Mistral."""

    MODEL_TYPE = "mistral"


class GPT2ForSamplingWithContextBroadcasting(GPT2ForSampling):
    """GPT-2, made with prompt_batch_size: one prompt, many answers. Every other family's class does so too."""


class OPTForSampling(NeuronAutoModelForCausalLM):
    """OPT."""

    MODEL_TYPE = "opt"
