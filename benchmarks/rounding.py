"""How far logits over a prompt are from HF's in float32, and HF's from themselves, as JSON.

    python benchmarks/rounding.py
    python benchmarks/rounding.py --positions 512 --prompts 12

The demo model, prompts of 5 to 400 tokens, plain and through the chat template. For each kind of difference, the
largest of each prompt: its median and largest over the prompts, and how many prompts stay under 1e-4.

    ours, hf             ours against HF's, both in float32
    ours, exact          ours against HF's with everything in float64
    hf, exact            HF's float32 against the same
    hf, hf nudged        HF's float32 against themselves, where the first number of each embedding is one float32 on
    hf, hf eager         HF's float32 against themselves, by its two formulations of attention
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from jx_neuron import LlamaForSampling, NeuronConfig
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import Checkpoint, open_checkpoint
from jx_neuron.util.progress import track

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Explain gravity to a child.",
    "def fibonacci(n):\n    ",
    "List three fruits, and say where each of them grows.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    * 4,
    "What is 2 + 2? Explain step by step, as you would to somebody who has never seen a number.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 16,
)
PAIRS = ("ours, hf", "ours, exact", "hf, exact", "hf, hf nudged", "hf, hf eager")
Logits = Callable[[list[int]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048, help="n_positions of ours")
    parser.add_argument("--prompts", type=int, default=2 * len(TEXTS), help="how many of the prompts")
    options = parser.parse_args()
    checkpoint = open_checkpoint(demo_model())
    all_of_them = NeuronConfig(output_all_logits=True)
    model = LlamaForSampling.from_pretrained(
        demo_model(), n_positions=options.positions, neuron_config=all_of_them
    ).to_neuron()
    engines: dict[str, Logits] = {
        "ours": lambda ids: model([ids])[0],
        "hf": of(original(checkpoint)),
        "exact": of(exact(original(checkpoint))),
        "hf nudged": of(nudged(original(checkpoint))),
        "hf eager": of(original(checkpoint, "eager")),
    }
    prompts = list(tokens(checkpoint.tokenizer()))[: options.prompts]
    largest: dict[str, list[float]] = {name: [] for name in PAIRS}
    for ids in track(prompts, "prompts", len(prompts)):
        logits = {name: engine(ids) for name, engine in engines.items()}
        for pair, each in largest.items():
            one, other = pair.split(", ")
            each.append(float(np.abs(logits[one] - logits[other]).max()))
    told = {
        pair: {"median": float(np.median(each)), "largest": max(each), "under_1e-4": sum(x < 1e-4 for x in each)}
        for pair, each in largest.items()
    }
    print(json.dumps({"prompts": len(prompts), "positions": options.positions, "differences": told}, indent=1))


def tokens(tokenizer: Any) -> Iterator[list[int]]:
    for text in TEXTS:
        yield tokenizer(text)["input_ids"]
        message = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        yield tokenizer(chat)["input_ids"]


def original(checkpoint: Checkpoint, attention: str = "sdpa") -> Any:
    config = transformers.LlamaConfig(**checkpoint.config, attn_implementation=attention)
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}, strict=False)
    model.tie_weights()
    return model


def of(model: Any) -> Logits:
    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits


def exact(model: Any) -> Any:
    """In float64, the norms too, which HF computes in float32 whatever the model's dtype."""

    def forward(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.double().modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(forward, module)
    return model


def nudged(model: Any) -> Any:
    def nudge(module: Any, inputs: Any, x_btd: torch.Tensor) -> torch.Tensor:
        x_btd[..., 0] = torch.nextafter(x_btd[..., 0], torch.tensor(torch.inf))
        return x_btd

    model.model.embed_tokens.register_forward_hook(nudge)
    return model


if __name__ == "__main__":
    main()
