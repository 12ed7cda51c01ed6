"""Simulated servers: what follows by arithmetic, the real engine beside them, and fleets."""

import asyncio
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import serving
import tiny
from typer.testing import CliRunner

from jx_neuron import InputError, NeuronAutoModelForCausalLM
from jx_neuron.artifact.settings import Settings
from jx_neuron.cli.app import app
from jx_neuron.engine.options import SamplingParams
from jx_neuron.models.known import config_of
from jx_neuron.planning import (
    Arrival,
    Load,
    Measured,
    Service,
    StepTimes,
    Target,
    find,
    plan,
    plan_fleet,
    simulate,
)
from jx_neuron.serve import AsyncEngine
from jx_neuron.step.buckets import Buckets
from jx_neuron.step.program_key import ProgramKey

DECODE, CHUNK = 0.01, 0.03
SETTINGS = Settings("gpt2", 1, "f32", (1, 2, 4), Buckets((16, 32), (128, 256)), 8, False, 97)


@dataclass
class Constant(StepTimes):
    """Steps of `DECODE` and `CHUNK` seconds."""

    settings: Settings = SETTINGS
    programs: frozenset[ProgramKey] | None = None
    turn: float = 0.0
    token: float = 0.0
    request: float = 0.0

    def step(self, key: ProgramKey) -> float:
        return DECODE if key.kind == "decode" else CHUNK

    def copy(self, slots: int) -> float:
        return 0.0


def alone(prompt: int, answer: int, at: float = 0.0, first: int = 0) -> Arrival:
    return Arrival(at, list(range(first, first + prompt)), answer)


def test_one_request_takes_its_chunks_and_its_decode_steps() -> None:
    service = simulate(Constant(), [alone(100, 11)])
    assert service.first_token.p50 == pytest.approx(4 * CHUNK)  # of 32, 32, 32 and 4 tokens
    assert service.between_tokens.mean == pytest.approx(DECODE)
    assert service.whole.mean == service.seconds == pytest.approx(4 * CHUNK + 10 * DECODE)
    assert service.tokens_per_second == pytest.approx(11 / service.seconds)
    assert service.busy == pytest.approx(1)
    assert service.cached == 0


def test_the_host_adds_its_time_where_the_device_waits() -> None:
    fast, slow = (simulate(Constant(turn=turn, request=0.5), [alone(20, 11)]) for turn in (0.0, 0.002))
    assert fast.first_token.mean == pytest.approx(0.5 + CHUNK)
    assert slow.first_token.mean == pytest.approx(0.5 + CHUNK + 0.002)
    assert fast.between_tokens.mean <= slow.between_tokens.mean < DECODE + 0.001  # dispatched ahead
    held_up = simulate(Constant(turn=2 * DECODE), [alone(20, 11)])
    assert held_up.between_tokens.p50 == pytest.approx(2 * DECODE)


def test_a_flood_is_answered_at_the_rate_of_full_steps() -> None:
    arrivals = [alone(10, 101, first=1000 * n) for n in range(40)]
    service = simulate(Constant(), arrivals)
    assert service.requests == 40
    assert 0.8 * 4 / DECODE < service.tokens_per_second < 4 / DECODE
    assert service.whole.p99 > 9 * service.whole.mean / 5
    several = simulate(Constant(), arrivals, replicas=4)  # 10 requests each, 4 at a time: 3 rounds in place of 10
    assert several.tokens_per_second == pytest.approx(10 / 3 * service.tokens_per_second, rel=0.02)
    refused = simulate(Constant(), arrivals, most_waiting=3)  # all come before the first turn
    assert (refused.requests, refused.refused) == (4 + 3, 33)


def test_prefixes_that_slots_hold_are_not_computed_again() -> None:
    load = Load(2.0, prompt=8, answer=4, shared=96)
    shared, apart = (simulate(Constant(), one, requests=50) for one in (load, replace(load, prompt=104, shared=0)))
    assert shared.cached > 0.85
    assert apart.cached == 0
    assert shared.first_token.mean < apart.first_token.mean / 2


def test_loads_have_their_rate_and_lengths(tmp_path: Path) -> None:
    load = Load(5.0, (10, 20), (1, 3))
    arrivals = load.arrivals(2000)
    assert arrivals == load.arrivals(2000) != load.arrivals(2000, seed=1)
    assert arrivals[-1].at == pytest.approx(400, rel=0.1)
    assert {len(one.prompt) for one in arrivals} == set(range(10, 21))
    assert {one.answer for one in arrivals} == {1, 2, 3}
    assert load.longest == 23
    seen = tmp_path / "seen.jsonl"
    seen.write_text('{"prompt_tokens": 7, "answer_tokens": 2}\n{"prompt_tokens": 3, "answer_tokens": 9}\n')
    assert {(len(a.prompt) - 5, a.answer) for a in Load.of_file(seen, 1.0, shared=5).arrivals(50)} == {(7, 2), (3, 9)}
    for line in ("", "{}", "[1]", "7", "{"):
        seen.write_text('{"prompt_tokens": 7, "answer_tokens": 2}\n' * bool(line) + line)
        with pytest.raises(InputError, match="line 2" if line else "no lines"):
            Load.of_file(seen, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rate=0), "rate=0 "),
        (dict(rate=1, prompt=0), "prompt=0"),
        (dict(rate=1, answer=(5, 4)), "the fewest and the most"),
        (dict(rate=1, prompt=(1, 2, 3)), "the fewest and the most"),
        (dict(rate=1, pairs=[(1, 2), (3,)]), "pair 1 of the load"),
    ],
)
def test_loads_that_are_none(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Load(**fields)


def test_requests_longer_than_the_model() -> None:
    with pytest.raises(InputError, match=r"a request has 300 tokens.*256 positions"):
        simulate(Constant(), [alone(200, 100)])


# beside the real engine


class Paced:
    """A runtime whose steps take the seconds of `times` at least, as those of a device do, one after another."""

    def __init__(self, runtime: object, times: StepTimes):
        self._runtime, self._times, self._free = runtime, times, 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._runtime, name)

    def run(self, step: object) -> object:
        output = self._runtime.run(step)
        self._free = max(self._free, time.perf_counter()) + self._times.step(step.key)
        return output._replace(token_b1=Later(output.token_b1, self._free))


class Later:
    """An array that can be read from a time on."""

    def __init__(self, array: object, at: float):
        self._array, self._at = array, at

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        time.sleep(max(0.0, self._at - time.perf_counter()))
        return np.asarray(self._array, dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NeuronAutoModelForCausalLM:
    folder = serving.checkpoint(tmp_path_factory.mktemp("model"))
    return serving.model(folder, batch_size=[1, 2, 4], context_length_estimate=[8, 16]).to_neuron()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 2.0, 20.0])
def test_an_engine_whose_steps_take_known_times_is_simulated_within_fifteen_percent(
    rate: float, model: NeuronAutoModelForCausalLM
) -> None:
    """Of steps of a tenth of a second, so that what else runs on this machine counts little."""

    class Slow(Constant):
        def step(self, key: ProgramKey) -> float:
            return 0.1 + 0.05 * (key.kind == "prefill")

    times = Slow(settings=model.settings)
    arrivals = Load(rate, (4, 40), (4, 16)).arrivals(24)
    real_runtime, found = model.engine.runtime, []

    async def main() -> None:
        engine = AsyncEngine(model)
        engine.start()
        while not engine.healthy or engine.stats().to_load:
            await asyncio.sleep(0.01)
        model.engine.runtime = Paced(real_runtime, times)
        began = time.perf_counter()

        async def one(arrival: Arrival) -> tuple[float, list[float]]:
            await asyncio.sleep(arrival.at - (time.perf_counter() - began))
            sent = time.perf_counter()
            prompt = [token % tiny.VOCAB for token in arrival.prompt]
            stream = engine.submit(prompt, SamplingParams(max_tokens=arrival.answer, eos_token_id=-1))
            return sent, [time.perf_counter() async for _ in stream]

        found.extend(await asyncio.gather(*map(one, arrivals)))
        await engine.shutdown(1)

    try:
        asyncio.run(main())
    finally:
        model.engine.runtime = real_runtime
    real, simulated = Service.of(found), simulate(times, arrivals)
    assert simulated.tokens_per_second == pytest.approx(real.tokens_per_second, rel=0.15)
    for spread in ("first_token", "between_tokens", "whole"):
        for kind in ("mean", "p95"):
            ours, theirs = (getattr(getattr(service, spread), kind) for service in (simulated, real))
            assert ours == pytest.approx(theirs, rel=0.15), (spread, kind)


@pytest.mark.slow
def test_a_model_is_measured_where_a_simulation_needs_it(model: NeuronAutoModelForCausalLM) -> None:
    times = Measured(model, runs=3)
    service = simulate(times, Load(50.0, (4, 40), (2, 8)), requests=20)
    programs = set(times.seconds)
    assert {key.kind for key in programs} == {"prefill", "decode"}
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in times.seconds.values())
    longest = max(max(seconds) for seconds in times.seconds.values())
    assert 0 < service.between_tokens.p50 <= 2 * longest
    assert times.copy(2) == 2 * times.copy(1) >= 0
    ids = tiny.prompts(1, 9)
    np.testing.assert_array_equal(model.sample(ids, 12, top_k=1), model.sample(ids, 12, top_k=1))


# fleets

OPT = config_of("facebook/opt-1.3b")
LOAD = Load(30.0, 256, 32)


def test_a_fleet_is_in_time_and_one_replica_fewer_is_not() -> None:
    target = Target(first_token=0.3, between_tokens=0.05)
    (fleet,) = plan_fleet(OPT, LOAD, target, instance="trn1.2xlarge", amp="bf16", requests=60)
    assert target.met(fleet.service)
    assert fleet.cores == fleet.replicas * fleet.tp_degree
    assert fleet.rate == pytest.approx(LOAD.rate / fleet.replicas)
    assert fleet.instances == -(-fleet.replicas // (2 // fleet.tp_degree))
    options = dict(instance="trn1.2xlarge", tp_degree=fleet.tp_degree, batch_size=fleet.batch_size, amp="bf16")
    fewer = replace(LOAD, rate=fleet.rate)
    (alone,) = plan_fleet(OPT, fewer, target, requests=60, **options)
    assert alone.replicas == 1
    overloaded = replace(LOAD, rate=LOAD.rate / (fleet.replicas - 1))
    (two,) = plan_fleet(OPT, overloaded, target, requests=60, **options)
    assert two.replicas == 2


def test_a_fleet_that_nothing_makes_fast_enough_is_refused() -> None:
    with pytest.raises(InputError, match=r"however large.*nearest, trn1.2xlarge at tp 2.*s to the first token"):
        plan_fleet(OPT, LOAD, Target(first_token=0.001), instance="trn1.2xlarge", amp="bf16")
    with pytest.raises(InputError, match="no replica fits"):
        plan_fleet(config_of("facebook/opt-66b"), LOAD, instance="inf2.xlarge", amp="bf16")
    with pytest.raises(InputError, match=r"tp_degree=3 is not legal; trn1.2xlarge may have \[1, 2\]"):
        plan_fleet(OPT, LOAD, instance="trn1.2xlarge", tp_degree=3)


def test_ultraservers() -> None:
    ultraserver, instance = find("trn2-ultraserver"), find("trn2.48xlarge")
    assert ultraserver.cores == 4 * instance.cores == 256
    assert ultraserver.link(64) == instance.link(64) == 4 * ultraserver.link(128)
    assert find("trn3-gen2-ultraserver").hops(256) == find("trn3-gen1-ultraserver").hops(2) == 1
    assert ultraserver.hops(256) == 6
    llama = {"model_type": "llama", "hidden_size": 8192}
    across, within = (plan(llama, "trn2-ultraserver", tp, amp="bf16", batch_size=64) for tp in (128, 64))
    of_instance = plan(llama, "trn2.48xlarge", 64, amp="bf16", batch_size=64)
    assert within.seconds_per_token == of_instance.seconds_per_token
    assert across.memory.weights < within.memory.weights


def test_fleets_on_the_command_line() -> None:
    arguments = ["fleet", "facebook/opt-1.3b", "--rate", "2", "--instance", "trn1.2xlarge", "--amp", "bf16"]
    arguments += ["--prompt-tokens", "16-32", "--answer-tokens", "4"]
    (fleet,) = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (fleet["instance"], fleet["cores"]) == ("trn1.2xlarge", 1)
    assert "trn1.2xlarge" in CliRunner().invoke(app, arguments).stdout
    for bad in (["--prompt-tokens", "x"], ["--prompt-tokens", "1-2-3"], ["--lengths", "x", "--answer-tokens", "4"]):
        assert isinstance(CliRunner().invoke(app, ["fleet", "gpt2", "--rate", "1", *bad]).exception, InputError)


@pytest.mark.slow
def test_simulations_on_the_command_line(tmp_path: Path) -> None:
    folder = serving.checkpoint(tmp_path)
    arguments = ["simulate", str(folder), "--rate", "20", "--prompt-tokens", "4-8", "--answer-tokens", "4"]
    arguments += ["--requests", "10", "--runs", "1", "--batch-size", "2"]
    service = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert service["requests"] == 10
    assert service["tokens_per_second"] > 0
    assert "whole answer" in CliRunner().invoke(app, arguments).stdout
    assert isinstance(CliRunner().invoke(app, ["simulate"]).exception, InputError)
