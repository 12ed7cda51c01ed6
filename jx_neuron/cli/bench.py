"""jx-neuron bench: how fast a model runs here."""

import json
import time
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import typer

from jx_neuron.cli import options
from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError

ROWS = {1: "1", 4: "2 to 4", 8: "5 to 8"}
"""The classes of rows of a formulation."""


def command(
    model: options.Model = None,
    demo: options.Demo = False,
    batch_size: options.BatchSize = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of each answer.")] = 128,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of runs; the medians are printed.")] = 5,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    tp: options.Tp = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure a model's speed: prefill, decode, and the time until it is ready.

    Prompts are random, answers are greedy, and no token ends them. The first run, which compiles, is listed separately.

        jx-neuron bench --demo

        jx-neuron bench ./my-gpt2 --batch-size 8 --dtype bf16 --json
    """
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    if demo == (model is not None):
        raise InputError("name one model: a checkpoint folder, .gguf file or hub id, or --demo")
    began = time.perf_counter()
    causal_lm = NeuronAutoModelForCausalLM.from_pretrained(
        demo_model() if model is None else model,
        batch_size=batch_size,
        n_positions=prompt_tokens + new_tokens,
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, kv_quant),
    ).to_neuron()
    loaded = time.perf_counter()
    prompt_bt = np.random.default_rng(0).integers(0, causal_lm.settings.vocab_size, (batch_size, prompt_tokens))
    _run(causal_lm, prompt_bt, new_tokens)
    ready = time.perf_counter()
    prefill_seconds, decode_seconds = np.median([_run(causal_lm, prompt_bt, new_tokens) for _ in range(runs)], axis=0)
    results = {
        "batch_size": batch_size,
        "amp": amp,
        "quant": quant,
        "kv_quant": kv_quant,
        "tp_degree": tp,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "load_seconds": loaded - began,
        "first_run_seconds": ready - loaded,
        "prefill_milliseconds": prefill_seconds * 1e3,
        "milliseconds_per_token": decode_seconds / (new_tokens - 1) * 1e3,
        "tokens_per_second": batch_size * (new_tokens - 1) / decode_seconds,
        "matmul": _matmul(causal_lm),
    }
    if as_json:
        typer.echo(json.dumps(results))
        return
    print_message(
        f"decode   {results['tokens_per_second']:.1f} tokens/s ({results['milliseconds_per_token']:.2f} ms a step)"
    )
    print_message(f"prefill  {results['prefill_milliseconds']:.0f} ms for {batch_size} x {prompt_tokens} tokens")
    print_message(
        f"ready    {results['load_seconds']:.2f} s to load, {results['first_run_seconds']:.2f} s for the first run"
    )
    if matmul := results["matmul"]:
        rows = [ROWS[most] for most in matmul["wide"]]
        wide = f", with vectors of 512 bits for {' and '.join(rows)} rows" if rows else ""
        print_message(
            f"matmul   up to {matmul['passes']} rows in passes{wide}; more by {matmul['dot']} ({matmul['reason']})"
        )


def _matmul(model: Any) -> dict[str, Any] | None:
    """How one CPU multiplies matrices, and why so; None for other runtimes."""
    from jx_neuron.runtime.cpu.formulation import choose

    if getattr(model.runtime, "formulation", None) is None:
        return None
    formulation, reason = choose(model.settings.dtype)
    return asdict(formulation) | {"reason": reason}


def _run(model: Any, prompt_bt: np.ndarray, new: int) -> tuple[float, float]:
    """Seconds to the first token of each row, and from there to the last."""
    began = first = time.perf_counter()
    steps = model.stream(prompt_bt, prompt_bt.shape[1] + new, top_k=1, eos_token_override=-1)
    for step, _ in enumerate(steps):
        if step == 0:
            first = time.perf_counter()
    return first - began, time.perf_counter() - first
