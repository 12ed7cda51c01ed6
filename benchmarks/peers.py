"""Decode and prefill of one model, ours and HF transformers' in turn, as JSON on standard output.

    python benchmarks/peers.py gpt2 --batch 1
    python benchmarks/peers.py opt --batch 8 --prefill 512

Weights are random but for smollm2; HF transformers runs eagerly. Each round times every engine once, so that what else
the machine does falls on all.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.demo import demo_model

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": transformers.GPT2Config,
    "gptj": lambda: transformers.GPTJConfig(n_embd=1024, n_layer=12, n_head=16),
    "opt": transformers.OPTConfig,
}
Engine = Callable[[np.ndarray, int], object]
"""Makes so many tokens after a prompt [b, t], greedily, and waits for them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*CONFIGS, "smollm2"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt before decode")
    parser.add_argument("--new", type=int, default=128, help="tokens made")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt of which prefill is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", nargs="+", default=["f32"], help="our dtypes, among f32, bf16 and f16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = original(options.model)
        model.save_pretrained(folder)
        engines = {"hf": hf(model)} | {f"jx_neuron_{amp}": ours(folder, amp, options) for amp in options.amp}
        found = measure(engines, model.config.vocab_size, options)
    print(json.dumps(dict(vars(options), cores=os.cpu_count(), jax=jax.__version__, engines=found), indent=1))


def original(name: str) -> Any:
    if name in CONFIGS:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    checkpoint = open_checkpoint(demo_model())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config)).eval()
    model.load_state_dict({n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}, strict=False)
    model.tie_weights()
    return model


def ours(folder: str, amp: str, options: argparse.Namespace) -> Engine:
    made = NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=options.batch, amp=amp, context_length_estimate=sorted({options.prompt, options.prefill})
    )
    return lambda ids_bt, new: made.sample(ids_bt, ids_bt.shape[1] + new, top_k=1, eos_token_override=-1)


def hf(model: Any) -> Engine:
    def generate(ids_bt: np.ndarray, new: int) -> object:
        ids = torch.from_numpy(ids_bt)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    return generate


def measure(engines: dict[str, Engine], vocabulary: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    short, long = (rng.integers(0, vocabulary, (options.batch, t)) for t in (options.prompt, options.prefill))
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in engines}
    for turn in range(options.rounds + 1):
        for name, generate in engines.items():
            times = tuple(timed(generate, *of) for of in ((short, 1), (short, options.new), (long, 1)))
            if turn:  # the first compiles
                seconds[name].append(times)
    found = {}
    for name, rows in seconds.items():
        first, whole, prefill = np.array(rows).T
        rate = np.median(options.batch * (options.new - 1) / (whole - first))
        found[name] = {"tokens_per_second": float(rate), "prefill_milliseconds": float(np.median(prefill) * 1e3)}
    return found


def timed(generate: Engine, ids_bt: np.ndarray, new: int) -> float:
    began = time.perf_counter()
    generate(ids_bt, new)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
