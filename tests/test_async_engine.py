"""AsyncEngine: each of many requests at once gets what it gets alone, and none is lost, whatever goes wrong."""

import asyncio
import random
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tiny

import jx_neuron
from jx_neuron.engine.options import SamplingParams
from jx_neuron.errors import InputError
from jx_neuron.serve.async_engine import AsyncEngine
from jx_neuron.serve.stream import DeadlineExceeded, EngineFailed, QueueFull, ShuttingDown

SHORT = SamplingParams(max_tokens=4)
LONG = SamplingParams(max_tokens=80)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> jx_neuron.NeuronAutoModelForCausalLM:
    folder = tiny.saved("llama", tmp_path_factory.mktemp("llama"))
    return jx_neuron.NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=4, n_positions=tiny.POSITIONS, context_length_estimate=[8, 16]
    ).to_neuron()


def run(model, test, **options) -> None:
    """Runs `test(engine)` on an event loop; then no slot is taken, and no task and no thread is left."""

    async def main() -> None:
        engine = AsyncEngine(model, **options)
        engine.start()
        while not engine.healthy:
            await asyncio.sleep(0.01)
        try:
            await test(engine)
        finally:
            await engine.shutdown(10)
        assert len(asyncio.all_tasks()) == 1
        assert engine.stats().running == engine.stats().waiting == 0
        assert model.engine.scheduler.slots.free >= 4
        assert not model.engine.scheduler.busy

    asyncio.run(main())
    assert "jx-neuron-engine" not in {thread.name for thread in threading.enumerate()}


async def answers(stream, count: int = 1) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(count)]
    async for event in stream:
        tokens[event.answer].append(event.token)
    return tokens


def request_of(rng: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = [rng.randrange(tiny.VOCAB) for _ in range(rng.randint(1, 60))]
    sampling = SamplingParams(max_tokens=rng.randint(1, 12), n=rng.choice([1, 1, 3]), logprobs=rng.choice([None, 2]))
    if rng.random() < 0.5:
        sampling = replace(sampling, temperature=1.0, seed=rng.randrange(1000))
    return prompt, sampling


def test_each_of_many_requests_gets_what_it_gets_alone(model) -> None:
    rng = random.Random(0)
    requests = [request_of(rng) for _ in range(200)]
    found: dict[int, list[list[int]]] = {}

    async def test(engine: AsyncEngine) -> None:
        async def one(number: int) -> None:
            prompt, sampling = requests[number]
            stream = engine.submit(prompt, sampling)
            if number % 7 == 0:
                await asyncio.sleep(rng.random() / 10)
                stream.cancel()
                stream.cancel()
            tokens = await answers(stream, sampling.n)
            if number % 7:
                found[number] = tokens
                timings = stream.timings
                assert timings.arrived <= timings.started <= timings.first_token <= timings.finished

        await asyncio.gather(*map(one, range(len(requests))))
        stats = engine.stats()
        assert stats.generation_tokens >= sum(len(answer) for several in found.values() for answer in several)
        assert stats.prompt_tokens >= sum(len(requests[number][0]) for number in found)

    run(model, test, most_waiting=200)
    assert len(found) == 171
    for number, tokens in found.items():
        prompt, sampling = requests[number]
        (alone,) = model.generate([prompt], sampling)
        assert tokens == [list(answer.ids) for answer in alone.answers], requests[number]


def test_prompts_have_log_probabilities(model) -> None:
    prompt = list(range(1, 40))
    (expected,) = model.log_likelihoods([prompt])

    async def test(engine: AsyncEngine) -> None:
        stream = engine.submit(prompt, replace(SHORT, n=2), prompt_logprobs=1)
        await anext(stream)
        first, *others = stream.prompt_logprobs
        assert first is None
        np.testing.assert_allclose([one.logprob for one in others], expected.logprobs, atol=1e-5)
        assert [one.rank == 1 for one in others] == expected.likeliest.tolist()
        assert [one.top[0][0] == token for one, token in zip(others, prompt[1:], strict=True)] == [
            one.rank == 1 for one in others
        ]
        stream.cancel()
        assert engine.submit(prompt, SHORT).prompt_logprobs is None

    run(model, test)


def test_a_prefix_is_taken_from_a_slot_and_counted(model) -> None:
    prefix = [5] * 40

    async def test(engine: AsyncEngine) -> None:
        await answers(engine.submit([*prefix, 1], SHORT))
        before = engine.stats()
        stream = engine.submit([*prefix, 2, 3], SHORT)
        tokens = await answers(stream)
        assert tokens == [list(model.generate([[*prefix, 2, 3]], SHORT)[0].ids)]
        assert stream.timings.cached_tokens == 40
        assert engine.stats().prefix_hits - before.prefix_hits >= 40

    run(model, test)


def test_a_short_prompt_goes_before_the_rest_of_a_long_one(model, monkeypatch) -> None:
    run_step, all_submitted = model.runtime.run, threading.Event()

    def step(inputs):
        all_submitted.wait()
        return run_step(inputs)

    async def test(engine: AsyncEngine) -> None:
        monkeypatch.setattr(model.runtime, "run", step)
        long = [engine.submit([n + 1] * 90, SHORT) for n in range(2)]
        short = engine.submit([7, 8, 9], SHORT)
        all_submitted.set()
        await asyncio.gather(*map(answers, (*long, short)))
        assert short.timings.first_token < min(stream.timings.first_token for stream in long)

    run(model, test)


def test_what_the_model_cannot_take_is_refused_at_once(model) -> None:
    async def test(engine: AsyncEngine) -> None:
        for prompt, sampling in (([tiny.VOCAB], SHORT), ([], SHORT), ([1] * 96, SHORT), ([1], replace(SHORT, n=0))):
            with pytest.raises(InputError):
                engine.submit(prompt, sampling)

    run(model, test)


def test_the_queue_is_bounded(model) -> None:
    async def test(engine: AsyncEngine) -> None:
        streams: list = []
        with pytest.raises(QueueFull) as full:
            streams.extend(engine.submit([n], LONG) for n in range(20))
        assert len(streams) == 4 + 3  # slots, and those that wait
        assert 1 <= full.value.retry_after <= 60
        assert all(len(tokens) == 80 for (tokens,) in await asyncio.gather(*map(answers, streams)))
        await asyncio.gather(*(answers(engine.submit([n], SHORT)) for n in range(7)))
        engine.submit([1], replace(SHORT, n=4))
        streams = [engine.submit([n], SHORT) for n in range(3)]
        with pytest.raises(QueueFull):
            engine.submit([1], SHORT)
        await asyncio.gather(*map(answers, streams))

    run(model, test, most_waiting=3)


def test_a_deadline_ends_a_request(model) -> None:
    async def test(engine: AsyncEngine) -> None:
        stream, other = engine.submit([1] * 60, LONG, deadline=0.001), engine.submit([2], SHORT, deadline=60)
        with pytest.raises(DeadlineExceeded):
            await answers(stream)
        assert len((await answers(other))[0]) == 4

    run(model, test)


def test_requests_end_before_it_shuts_down(model) -> None:
    async def test(engine: AsyncEngine) -> None:
        streams = [engine.submit([n], LONG) for n in range(6)]
        running = [asyncio.create_task(answers(stream)) for stream in streams]
        await asyncio.sleep(0)
        await engine.shutdown()
        assert [len(tokens) for (tokens,) in await asyncio.gather(*running)] == [80] * 6
        with pytest.raises(ShuttingDown):
            engine.submit([1], SHORT)

    run(model, test)


def test_requests_that_do_not_end_in_time_are_told_that_it_shuts_down(model) -> None:
    async def test(engine: AsyncEngine) -> None:
        streams = [engine.submit([n], LONG) for n in range(6)]
        await engine.shutdown(0)
        for stream in streams:
            with pytest.raises(ShuttingDown):
                await answers(stream)

    run(model, test)


def test_a_step_that_raises_fails_its_requests_alone(model, monkeypatch) -> None:
    run_step, failing = model.runtime.run, threading.Event()

    def step(inputs):
        if failing.is_set():
            raise RuntimeError("the device is lost")
        return run_step(inputs)

    async def test(engine: AsyncEngine) -> None:
        monkeypatch.setattr(model.runtime, "run", step)
        for failures in range(3):
            assert engine.healthy, failures
            failing.set()
            with pytest.raises(RuntimeError, match="the device is lost"):
                await answers(engine.submit([1, 2], SHORT))
        assert not engine.healthy
        failing.clear()
        assert len((await answers(engine.submit([1, 2], SHORT)))[0]) == 4
        assert engine.healthy

    run(model, test)


def test_a_turn_that_raises_fails_the_engine(model, monkeypatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        def step():
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(model.engine, "step", step)
            with pytest.raises(EngineFailed, match="no room"):
                await answers(engine.submit([1], SHORT))
        assert not engine.healthy
        with pytest.raises(EngineFailed, match="no room"):
            engine.submit([1], SHORT)
        model.engine.step()

    run(model, test)


def test_a_turn_that_hangs_fails_the_requests(model, monkeypatch) -> None:
    run_step, goes_on = model.runtime.run, threading.Event()

    def step(inputs):
        goes_on.wait()
        return run_step(inputs)

    async def test(engine: AsyncEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(model.runtime, "run", step)
            began = time.perf_counter()
            with pytest.raises(EngineFailed, match=r"a turn of the engine takes more than 0\.3 s"):
                await answers(engine.submit([1], SHORT))
            assert time.perf_counter() - began < 5
            assert not engine.healthy
            with pytest.raises(EngineFailed):
                engine.submit([1], SHORT)
            goes_on.set()
            while not engine.healthy:
                await asyncio.sleep(0.01)
            assert len((await answers(engine.submit([1], SHORT)))[0]) == 4

    run(model, test, seconds_per_turn=0.3)


@pytest.mark.slow
def test_memory_does_not_grow(model) -> None:
    rng, sizes = random.Random(1), []

    async def test(engine: AsyncEngine) -> None:
        async def caller(count: int) -> None:
            for _ in range(count):
                prompt, sampling = request_of(rng)
                stream = engine.submit(prompt, replace(sampling, n=1))
                if rng.random() < 0.1:
                    await anext(stream)
                    stream.cancel()
                await answers(stream)

        for count in (16, 140):
            await asyncio.gather(*(caller(count) for _ in range(64)))
            sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        run(model, test)
    finally:
        tracemalloc.stop()
    assert sizes[1] < sizes[0] * 1.02
