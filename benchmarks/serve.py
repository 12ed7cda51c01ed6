"""Throughput and time to first token over HTTP, as JSON: compared with vLLM with and without our plugin, and llama.cpp.

    python benchmarks/serve.py --at-once 8 --output serve.json
    VLLM_PYTHON=…/bin/python LLAMA_SERVER=…/llama-server python benchmarks/serve.py --peers vllm llama_cpp

The model is SmolLM2 in float32. Each round times every server once, and the engine of this package without HTTP.
Figures are medians of rounds, and ratios medians of each round's. Peers that are not installed are left out.

tokens_per_second: of answers to as many requests as are sent at once, each with a prompt of its own
engine:            the same prompts by `generate`, with the server's buckets
of:                the tokens per second of jx_neuron's server, compared with those of each other
first_token_…:     seconds to a short request's answer of one token: alone, and sent just behind a long prompt
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import cpu, features, original
from servers import Ask, llama_cpp_server, served, vllm_server
from task import Task, UnsupportedError, save

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.serve.sizes import sizes

HEAD_START = 0.05  # seconds between a long prompt and the short one behind it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=8, help="requests at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--long", type=int, default=1500, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--output", type=Path, help="a file for the JSON, besides standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = original("smollm2")
        save(model, Path(folder))
        longest = max(options.prompt + options.new, options.long + 2)
        task = Task(model, Path(folder), options.at_once, longest)
        servers = {"jx_neuron": server(task)}
        for name in options.peers:
            try:
                servers[name] = PEERS[name](task)
            except (ImportError, UnsupportedError) as why:
                print(f"{name} is skipped: {why}", file=sys.stderr)
        result = measure(servers, engine(task, options), model.config.vocab_size, options)
    setting = {name: value for name, value in vars(options).items() if name not in ("output", "peers")}
    machine = dict(cores=os.cpu_count(), cpu=cpu(), features=features(), date=str(date.today()))
    text = json.dumps(setting | machine | result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def server(task: Task) -> Ask:
    """The server of this package."""
    command = [sys.executable, "-m", "jx_neuron", "serve", task.folder]
    options = {"batch-size": task.batch, "n-positions": task.length}
    ask = served(command, options, task.folder / "jx_neuron.log")
    while not re.search(r"^vllm:programs_to_load{.*} 0\.0$", ask("metrics", None), re.MULTILINE):
        time.sleep(1)
    return ask


def engine(task: Task, options: argparse.Namespace) -> Callable[[list[list[int]]], object]:
    """The engine of this package, without HTTP."""
    buckets = sizes(task.folder, task.batch, task.length, None)
    model = NeuronAutoModelForCausalLM.from_pretrained(task.folder, n_positions=task.length, **buckets)
    sampling = SamplingParams(max_tokens=options.new, top_k=1, eos_token_id=-1)
    return lambda prompts: model.generate(prompts, sampling)


PEERS: Mapping[str, Callable[[Task], Ask]] = {
    "vllm": vllm_server,
    "vllm_plugin": partial(vllm_server, plugins="jx_neuron"),
    "llama_cpp": llama_cpp_server,
}


def measure(
    servers: Mapping[str, Ask],
    alone: Callable[[list[list[int]]], object],
    vocab_size: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    random = np.random.default_rng(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return random.integers(100, vocab_size, (count, length)).tolist()

    rates: dict[str, list[float]] = {name: [] for name in (*servers, "engine")}
    firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for number in range(options.rounds + 1):  # the first compiles, and does not count
        for name, ask in servers.items():
            rate = (
                options.at_once
                * options.new
                / seconds(together, ask, prompts(options.at_once, options.prompt), options)
            )
            first = first_token(ask, prompts, options)
            if number:
                rates[name].append(rate)
                firsts[name].append(first)
        rate = options.at_once * options.new / seconds(alone, prompts(options.at_once, options.prompt))
        if number:
            rates["engine"].append(rate)

    def medians(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return {name: round(statistics.median(column), 3) for name, column in columns.items()}

    others = {name: zip(rates["jx_neuron"], rates[name], strict=True) for name in rates if name != "jx_neuron"}
    return dict(
        tokens_per_second=medians(rates),
        of={name: medians({"": [ours / theirs for ours, theirs in pairs]})[""] for name, pairs in others.items()},
        first_token_alone=medians({name: [alone for alone, _ in several] for name, several in firsts.items()}),
        first_token_behind=medians({name: [behind for _, behind in several] for name, several in firsts.items()}),
        behind_of_alone=medians(
            {name: [behind / alone for alone, behind in several] for name, several in firsts.items()}
        ),
    )


def seconds(call: Callable[..., object], *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def complete(ask: Ask, prompt: list[int], new: int) -> None:
    """Has a server answer with exactly `new` tokens."""
    fields = dict(prompt=prompt, max_tokens=new, temperature=0, ignore_eos=True)
    usage = ask("v1/completions", fields)["usage"]
    assert usage["completion_tokens"] == new, usage


def together(ask: Ask, prompts: list[list[int]], options: argparse.Namespace) -> None:
    """Sends all prompts at once, and waits for all answers."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: complete(ask, prompt, options.new), prompts))


def first_token(
    ask: Ask, prompts: Callable[[int, int], list[list[int]]], options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of a short request alone, and behind a long prompt."""
    (one,), (other,), (long,) = prompts(1, options.prompt), prompts(1, options.prompt), prompts(1, options.long)
    alone = seconds(complete, ask, one, 1)
    before = threading.Thread(target=complete, args=(ask, long, 1))
    before.start()
    time.sleep(HEAD_START)
    behind = seconds(complete, ask, other, 1)
    before.join()
    return alone, behind


if __name__ == "__main__":
    main()
