"""The simulator of `jx_neuron.planning`, compared with the server that it simulates, under three loads, as JSON.

    python benchmarks/simulator.py --output simulator.json

The server is that of `jx-neuron serve --demo`, in float32, with clients of another process that stream. Loads are
shares of the requests/s that the simulator says the server can answer at most. Of each figure there are the simulated
one, the server's, and their ratio:

before:  step times are measured just before a load, as `jx-neuron simulate` does
within:  step times are those of the steps of the server's own run, so that whatever else the machine does meanwhile
         slows both alike
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from peers import cpu

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.planning import Arrival, Load, Measured, Service, simulate
from jx_neuron.serve import AsyncEngine, Server, ServerSettings, app
from jx_neuron.serve.sizes import sizes
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput

LOADS = {"light": 0.3, "near saturation": 0.8, "saturated": 2.0}
FLOOD = 1e3  # requests/s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="requests of a load")
    parser.add_argument("--prompt", type=int, nargs=2, default=[20, 120], help="tokens of prompts, fewest and most")
    parser.add_argument("--answer", type=int, nargs=2, default=[16, 64], help="tokens of answers, fewest and most")
    parser.add_argument("--n-positions", type=int, default=256)
    parser.add_argument("--loads", nargs="*", default=list(LOADS), choices=LOADS)
    parser.add_argument("--output", type=Path, help="a file for the JSON, besides standard output")
    options = parser.parse_args()
    lengths = dict(prompt=tuple(options.prompt), answer=tuple(options.answer))
    path = demo_model()
    model = NeuronAutoModelForCausalLM.from_pretrained(
        path, **sizes(path, None, options.n_positions, None), n_positions=options.n_positions
    ).to_neuron()
    results = {}
    recorder = model.engine.runtime = Recorder(model.engine.runtime)
    with serving(model) as url, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clients:
        most = simulate(Measured(model), Load(FLOOD, **lengths), requests=options.requests).requests_per_second
        for name in options.loads:
            load = Load(LOADS[name] * most, **lengths)
            arrivals = load.arrivals(options.requests)
            clients.submit(os.getpid).result()  # it has started
            before, within = Measured(model), Measured(model)
            simulated = simulate(before, arrivals)
            recorder.seconds.clear()
            real = Service.of(clients.submit(driven, url, arrivals, model.settings.vocab_size).result())
            within.seconds |= {key: list(seconds) for key, seconds in recorder.seconds.items()}
            results[name] = dict(rate=round(load.rate, 3), load_average=[round(one) for one in os.getloadavg()])
            results[name] |= dict(before=beside(simulated, real), within=beside(simulate(within, arrivals), real))
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    machine = dict(cores=os.cpu_count(), cpu=cpu(), date=str(date.today()))
    setting = {name: value for name, value in vars(options).items() if name not in ("output", "loads")}
    text = json.dumps(setting | machine | results, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


class Recorder:
    """A runtime that says how long its steps took.

    A step lasts from when it was dispatched, or the one before was done, until it is done: the engine waits for it.

    Attributes:
        seconds: of each program's steps.
    """

    def __init__(self, runtime: Any):
        self._runtime, self._done = runtime, 0.0
        self.seconds: dict[ProgramKey, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def run(self, step: StepInput) -> StepOutput:
        began = time.perf_counter()
        output = self._runtime.run(step)

        def done() -> None:
            seconds = self.seconds.setdefault(step.key, [])
            now = time.perf_counter()
            seconds.append(now - max(began, self._done))
            self._done = now

        return output._replace(token_b1=_Read(output.token_b1, done))


class _Read:
    """An array that says when it was read."""

    def __init__(self, array: Any, done: Callable[[], None]):
        self._array, self._is_done = array, done

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self._array, dtype)
        self._is_done()
        return array


@contextmanager
def serving(model: Any) -> Iterator[str]:
    """Serves a model from a thread of this process. Gives the server's address, once it has all its programs."""
    settings, listening, ports = ServerSettings(names=("demo",)), threading.Event(), list[int]()

    def ready(port: int) -> None:
        ports.append(port)
        listening.set()

    engine = AsyncEngine(model)
    server = Server(app(model, engine, settings), settings, "127.0.0.1", 0, ready=ready)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    listening.wait()
    while not engine.healthy or engine.stats().to_load:
        time.sleep(0.1)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        server.should_exit = True
        thread.join()


def driven(url: str, arrivals: Sequence[Arrival], vocab_size: int) -> list[tuple[float, list[float]]]:
    """What `drive` returns."""
    return asyncio.run(drive(url, arrivals, vocab_size))


async def drive(url: str, arrivals: Sequence[Arrival], vocab_size: int) -> list[tuple[float, list[float]]]:
    """Sends requests when they are to arrive. Returns when each was sent, and when each of its tokens came."""
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        began = time.perf_counter()

        async def one(arrival: Arrival) -> tuple[float, list[float]]:
            await asyncio.sleep(arrival.at - (time.perf_counter() - began))
            prompt = [token % vocab_size for token in arrival.prompt]
            fields = dict(prompt=prompt, max_tokens=arrival.answer, temperature=0, ignore_eos=True)
            fields |= dict(stream=True, return_token_ids=True)
            sent, tokens = time.perf_counter(), list[float]()
            async with client.stream("POST", f"{url}/v1/completions", json=fields) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        tokens += [time.perf_counter()] * len(json.loads(line[6:])["choices"][0]["token_ids"])
            assert len(tokens) == arrival.answer, (len(tokens), arrival.answer)
            return sent, tokens

        return await asyncio.gather(*map(one, arrivals))


def beside(simulated: Service, real: Service) -> dict[str, Any]:
    """The figures of both, and the ratio."""

    def figures(service: Service) -> dict[str, float]:
        spreads = {name: getattr(service, name) for name in ("first_token", "between_tokens", "whole")}
        return dict(tokens_per_second=service.tokens_per_second) | {
            f"{name}_{kind}": getattr(spread, kind) for name, spread in spreads.items() for kind in ("mean", "p95")
        }

    pairs = zip(figures(simulated).items(), figures(real).values(), strict=True)
    return {name: [round(ours, 4), round(theirs, 4), round(ours / theirs, 3)] for (name, ours), theirs in pairs}


if __name__ == "__main__":
    main()
