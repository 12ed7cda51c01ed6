"""Decode and prefill of one model, ours and its peers' in turn, as JSON on standard output.

    python benchmarks/peers.py gpt2 --batch 1 4 8
    python benchmarks/peers.py smollm2 --batch 1 --amp f32 bf16 --output smollm2.json

The peers are HF transformers, run eagerly, and CTranslate2 where it is installed (pip install 'jx-neuron[bench]').
Weights are random but for smollm2, and float32 but for --amp. Each round times every engine once, so that what else the
machine does falls on all; figures are medians of rounds, and ratios medians of each round's.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
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
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt before decode")
    parser.add_argument("--new", type=int, default=128, help="tokens made")
    parser.add_argument(
        "--prefill",
        type=int,
        default=512,
        help="tokens of the prompt of which prefill is timed, at the first batch alone",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", nargs="+", default=["f32"], help="our dtypes, among f32, bf16 and f16")
    parser.add_argument("--output", type=Path, help="a file for the JSON, beside standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = original(options.model)
        model.save_pretrained(folder)
        peers = {"hf": hf(model)}
        if importlib.util.find_spec("ctranslate2"):
            peers["ctranslate2"] = ctranslate2(folder, model.config)
        rows = []
        for batch in options.batch:
            engines = peers | {f"jx_neuron_{amp}": ours(folder, amp, batch, options) for amp in options.amp}
            prefill = options.prefill if batch == options.batch[0] else None
            engines_found = measure(engines, model.config.vocab_size, batch, prefill, options)
            rows.append({"batch": batch, "engines": engines_found})
    setting = {name: value for name, value in vars(options).items() if name not in ("batch", "output")}
    text = json.dumps(dict(setting, cores=os.cpu_count(), cpu=cpu(), jax=jax.__version__, rows=rows), indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def cpu() -> str:
    """The CPU's name, where the system tells."""
    found = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return found[1] if found else platform.processor()


def original(name: str) -> Any:
    if name in CONFIGS:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    checkpoint = open_checkpoint(demo_model())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config)).eval()
    model.load_state_dict({n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}, strict=False)
    model.tie_weights()
    return model


def ours(folder: str, amp: str, batch: int, options: argparse.Namespace) -> Engine:
    made = NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=batch, amp=amp, context_length_estimate=sorted({options.prompt, options.prefill})
    )
    return lambda ids_bt, new: made.sample(ids_bt, ids_bt.shape[1] + new, top_k=1, eos_token_override=-1)


def ctranslate2(folder: str, config: Any) -> Engine:
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    class Vocabulary:
        """Ids as tokens: CTranslate2 converts no model without a tokenizer."""

        bos_token, eos_token, unk_token = "0", "1", "2"

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(config.vocab_size)}

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Vocabulary:
            return Vocabulary()

    converted = str(Path(folder, "ctranslate2"))
    Converter(folder).convert(converted)
    generator = Generator(converted, compute_type="float32", intra_threads=os.cpu_count())

    def generate(ids_bt: np.ndarray, new: int) -> object:
        made = generator.generate_batch(
            [[str(i) for i in row] for row in ids_bt],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        assert all(len(of.sequences_ids[0]) == new for of in made)
        return made

    return generate


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


def measure(
    engines: dict[str, Engine], vocabulary: int, batch: int, prefill: int | None, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Tokens per second of each engine and, of a prompt of `prefill` tokens, milliseconds; ours over each peer's."""
    rng = np.random.default_rng(0)
    asked = [(options.prompt, 1), (options.prompt, options.new), *([(prefill, 1)] if prefill else [])]
    calls = [(rng.integers(3, vocabulary, (batch, t)), new) for t, new in asked]
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for turn in range(options.rounds + 1):
        for name, generate in engines.items():
            times = [timed(generate, *call) for call in calls]
            if turn:  # the first compiles
                seconds[name].append(times)
    first, whole, *rest = ({name: np.array(rows)[:, i] for name, rows in seconds.items()} for i in range(len(calls)))
    per_token = {name: (whole[name] - first[name]) / (options.new - 1) / batch for name in engines}
    found = {name: {"tokens_per_second": float(1 / np.median(per_token[name]))} for name in engines}
    for what, times in (("decode", per_token), *(("prefill", times) for times in rest)):
        for name in engines:
            if what == "prefill":
                found[name]["prefill_milliseconds"] = float(1e3 * np.median(times[name]))
            if name.startswith("jx_neuron"):
                for peer in (peer for peer in engines if not peer.startswith("jx_neuron")):
                    found[name][f"{what}_over_{peer}"] = float(np.median(times[peer] / times[name]))
    return found


def timed(generate: Engine, ids_bt: np.ndarray, new: int) -> float:
    began = time.perf_counter()
    generate(ids_bt, new)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
