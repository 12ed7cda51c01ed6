"""Decode on a GPU, as a fraction of the bandwidth of copies, and compared with HF transformers compiled.

    python benchmarks/gpu.py
    python benchmarks/gpu.py gptj-6b --batch 1 --json
    python benchmarks/gpu.py --tiny --platform cpu

bfloat16 and greedy; weights are random and drawn on the device. A step reads the weights once (of tables that are
looked up, nothing) and the cache's whole bucket: those bytes over the time of a step are compared with copying, which
reads and writes, measured in the same process. HF transformers runs with a static cache of the bucket's length and
torch.compile. Every model of either runs in a process of its own, so that one's memory is never the other's. Medians
of runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.weights import Packing, Params
from jx_neuron.engine.answer import steps
from jx_neuron.engine.draw import Draw
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.options import Choice
from jx_neuron.engine.processors import Processors
from jx_neuron.engine.scheduler import Scheduler
from jx_neuron.models import Decoder
from jx_neuron.models.known import KNOWN
from jx_neuron.nn import sharding
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.published import CONFIGS
from jx_neuron.runtime.xla import XlaRuntime
from jx_neuron.step.buckets import Buckets

MODELS: dict[str, dict[str, Any]] = {
    "gptj-6b": KNOWN["EleutherAI/gpt-j-6B"],
    "llama-3-8b": CONFIGS["Llama-3-8B"],
    "opt-13b": KNOWN["facebook/opt-13b"],
}
TINY: dict[str, dict[str, Any]] = {
    "gptj-6b": dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=512, bos_token_id=0, eos_token_id=0),
    "llama-3-8b": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    ),
    "opt-13b": dict(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, word_embed_proj_dim=64,
    ),
}  # fmt: skip
DTYPE = jnp.dtype(jnp.bfloat16)
PROMPT = 16


@dataclass(frozen=True)
class Drawn:
    """A source of parameters for `XlaRuntime` that draws them on the device; the host never holds one."""

    decoder: Decoder

    def place(
        self,
        mesh: Mesh,
        packing: Packing | None = None,
        put: Callable[[str, np.ndarray], np.ndarray] | None = None,
    ) -> Params:
        """All parameters on the one device of `mesh`; `packing` and `put` as of weights.Source.place."""

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return 0.02 * jax.random.normal(key, shape, DTYPE)

        drawn = jax.jit(draw, static_argnums=1, out_shardings=NamedSharding(mesh, PartitionSpec()))
        shapes = sorted(self.decoder.abstract_params(DTYPE).items())
        placed: Params = {path: drawn(jax.random.key(n), leaf.shape) for n, (path, leaf) in enumerate(shapes)}
        for path, (parts, pack) in (packing or {}).items():
            placed[path] = pack([placed.pop(part) for part in parts])
        if put:
            placed = {name: jax.device_put(put(name, np.asarray(array))) for name, array in placed.items()}
        return dict(sorted(placed.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"by default all: {', '.join(MODELS)}", default=list(MODELS)
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows")
    parser.add_argument("--bucket", type=int, help="positions read at each step; by default 1024, or 64 with --tiny")
    parser.add_argument("--new", type=int, help="tokens made; by default 256, or 8 with --tiny")
    parser.add_argument("--runs", type=int, default=5, help="runs, of which the median is given, after one not counted")
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu", help="where to run")
    parser.add_argument("--tiny", action="store_true", help="models of the same families with two narrow layers")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - set(MODELS)):
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(MODELS)}")
    options.bucket = options.bucket or (64 if options.tiny else 1024)
    options.new = options.new or (8 if options.tiny else 256)
    if min(options.new - 1, options.runs, *options.batch) < 1:
        parser.error("--batch and --runs are at least 1, and --new at least 2")
    if PROMPT + options.new > options.bucket:
        parser.error(f"a prompt of {PROMPT} and {options.new} new tokens exceed --bucket {options.bucket}")
    try:
        device = alone(kind_of_device, options.platform)
    except RuntimeError as error:
        parser.error(f"JAX has no {options.platform} here ({error}); try --platform cpu --tiny")
    absent = alone(why_no_hf, options.platform)
    rows = []
    for name in options.models:
        raw = MODELS[name] | (TINY[name] if options.tiny else {})
        rates = [None] * len(options.batch) if absent else alone(hf_rates, raw, "cuda", options)
        found = alone(our_rates, raw, options)
        rows += [dict(model=name, **row, hf_tokens_per_second=rate) for row, rate in zip(found, rates, strict=True)]
    about = dict(device=device, jax=jax.__version__, dtype=DTYPE.name, tiny=options.tiny, bucket=options.bucket)
    about |= dict(new=options.new, runs=options.runs, hf_left_out=absent)
    print(json.dumps(dict(about, rows=rows), indent=1) if options.json else table(about, rows))


def alone(task: Callable[..., Any], *given: Any) -> Any:
    """What `task` gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(task, *given).result()


def kind_of_device(platform: str) -> str:
    return str(jax.devices(platform)[0].device_kind)


def why_no_hf(platform: str) -> str | None:
    """Why HF transformers is not measured here; None where it is."""
    if platform != "gpu":
        return "it is measured on a GPU alone"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def our_rates(raw: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens and bytes a second at each batch."""
    mesh = sharding.mesh(1, jax.devices(options.platform))
    decoder, outline = Decoder.from_config(raw), Outline.of(raw)
    copied = copy_rate(mesh.devices.flat[0], 2**24 if options.tiny else 2**30, options.runs)
    runtime = XlaRuntime(decoder, Drawn(decoder), mesh, DTYPE)
    rows = []
    for batch in options.batch:
        engine = Engine(runtime, Scheduler(Buckets((PROMPT,), (options.bucket,)), [batch]), raw["vocab_size"])
        seconds = np.median([decode_seconds(engine, batch, options.new) for _ in range(options.runs + 1)][1:])
        read = DTYPE.itemsize * outline.read_elements(1) + outline.cache_bytes(1, batch, options.bucket, DTYPE.itemsize)
        rows.append(
            dict(
                batch=batch,
                bytes_per_step=read,
                copied_bytes_per_second=copied,
                read_bytes_per_second=read / seconds,
                fraction_of_copy=read / seconds / copied,
                tokens_per_second=batch / seconds,
            )
        )
    return rows


def decode_seconds(engine: Engine, batch: int, new: int) -> float:
    """Of one step, over `new` - 1 of them; the prompt and the first steps, which grow the table, are not timed."""
    draw = Draw(1.0, 1, 1.0, 0.0, 1, 1, None)
    choice = Choice(draw, Processors(), new + 1, (), (), None)
    tickets = [engine.submit(row.tolist(), [choice])[0] for row in prompts(batch, engine.vocab_size)]
    steps_ = steps(tickets, 0)
    next(steps_), next(steps_)
    began = time.perf_counter()
    for _ in steps_:
        pass
    return (time.perf_counter() - began) / (new - 1)


def copy_rate(device: jax.Device, size: int, runs: int, times: int = 8) -> float:
    """Bytes a second, read and written, of copies of `size` bytes on the device."""
    with jax.default_device(device):
        source, copy = jnp.zeros(size // 4, jnp.float32), jax.jit(jnp.copy)
        seconds = []
        for _ in range(runs + 1):
            source.block_until_ready()
            began = time.perf_counter()
            for _ in range(times):
                source = copy(source)
            source.block_until_ready()
            seconds.append(time.perf_counter() - began)
    return float(2 * size * times / np.median(seconds[1:]))


def hf_rates(raw: dict[str, Any], device: str, options: argparse.Namespace) -> list[float]:
    """Tokens a second of HF transformers at each batch, from the time of generate() less that of its first token."""
    import torch
    import transformers

    from jx_neuron.integrations.hf_generate import CACHE

    compiled = transformers.CompileConfig(fullgraph=True, dynamic=False)
    compiled._compile_all_devices = True
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def seconds(ids_bt: Any, cache: Any, new: int) -> float:
        cache.reset()
        began = time.perf_counter()
        model.generate(
            ids_bt,
            attention_mask=torch.ones_like(ids_bt),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            compile_config=compiled,
            **{CACHE: cache},
        ).cpu()
        return time.perf_counter() - began

    rates = []
    for batch in options.batch:
        ids_bt = torch.from_numpy(prompts(batch, raw["vocab_size"])).to(device)
        cache = transformers.StaticCache(config=model.config, max_cache_len=options.bucket)
        torch.compiler.reset()  # or the batch would be compiled as of any size
        rounds = [[seconds(ids_bt, cache, new) for new in (1, options.new)] for _ in range(options.runs + 2)]
        first, whole = np.median(rounds[2:], axis=0)  # the first two compile, and record CUDA graphs
        rates.append(float(batch * (options.new - 1) / (whole - first)))
    return rates


def prompts(batch: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, PROMPT))


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["model", "batch", "tokens/s", "GB/s read", "of copying"] + ["HF, tokens/s", "ratio"] * (
        about["hf_left_out"] is None
    )
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        ours, hf = row["tokens_per_second"], row["hf_tokens_per_second"]
        line = [row["model"], row["batch"], f"{ours:,.0f}", f"{row['read_bytes_per_second'] / 1e9:,.1f}"]
        line += [f"{row['fraction_of_copy']:.0%}"] + ([] if hf is None else [f"{hf:,.0f}", f"{ours / hf:.2f}"])
        lines.append(line)
    told = [f"{about['device']}, jax {about['jax']}, {about['dtype']}, bucket {about['bucket']}"]
    told += [f"HF transformers is left out: {why}" for why in [about["hf_left_out"]] if why]
    return "\n".join([*told, "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


if __name__ == "__main__":
    main()
