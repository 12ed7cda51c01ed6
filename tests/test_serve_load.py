"""Thousands of requests of random shapes at once, some cancelled and some malformed."""

import asyncio
import random
import re
from pathlib import Path

import httpx
import pytest
import serving

REQUESTS, AT_ONCE, KINDS = 10_000, 64, 1_000
WARM, GROWTH = 1_000, 1.02  # requests after which memory is measured, and what it may grow by since


def shape(kind: int) -> dict:
    """A request; those of a kind have the same answer."""
    draw = random.Random(kind)
    prompt = [draw.randrange(95) for _ in range(draw.randrange(1, 70))]
    fields = dict(prompt=prompt, max_tokens=draw.randrange(1, 24), n=draw.choice([1, 1, 2]), return_token_ids=True)
    fields |= draw.choice([dict(temperature=0), dict(temperature=1.0, seed=kind, top_k=draw.choice([5, 40]))])
    return fields | draw.choice([{}, {}, dict(logprobs=2), dict(presence_penalty=0.5), dict(stop="ab")])


def memory(pid: int) -> int:
    """The resident memory of a process, in KiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


async def until_zero(client: httpx.AsyncClient, name: str, seconds: float) -> None:
    """Waits until a metric is 0."""
    async with asyncio.timeout(seconds):
        while not re.search(rf"^vllm:{name}{{.*}} 0\.0$", (await client.get("/metrics")).text, re.MULTILINE):
            await asyncio.sleep(0.5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read of /proc")
def test_each_answer_is_that_of_its_request_alone(tmp_path: Path) -> None:
    folder = serving.checkpoint(tmp_path / "tiny")

    async def answer(client: httpx.AsyncClient, kind: int) -> list[list[int]]:
        response = await client.post("/v1/completions", json=shape(kind))
        assert response.status_code == 200, response.text
        return [choice["token_ids"] for choice in response.json()["choices"]]

    async def cancelled(client: httpx.AsyncClient, kind: int) -> None:
        async with client.stream("POST", "/v1/completions", json=shape(kind) | dict(stream=True)) as response:
            assert response.status_code == 200
            async for _ in response.aiter_lines():
                break

    async def malformed(client: httpx.AsyncClient, kind: int) -> None:
        bad = random.Random(kind).choice(
            [dict(prompt=[101]), dict(max_tokens=99), dict(n=0), dict(what=1), dict(prompt=[])]
        )
        response = await client.post("/v1/completions", json=shape(kind) | bad)
        assert response.status_code == 400, response.text

    async def run(server: serving.Process) -> None:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
            alone = [await answer(client, kind) for kind in range(KINDS)]
            await until_zero(client, "programs_to_load", 600)
            kinds, before = iter(range(REQUESTS)), 0

            async def caller() -> None:
                nonlocal before
                for number in kinds:
                    draw = random.Random(-number)
                    kind, lot = draw.randrange(KINDS), draw.random()
                    if lot < 0.1:
                        await cancelled(client, kind)
                    elif lot < 0.2:
                        await malformed(client, kind)
                    else:
                        assert await answer(client, kind) == alone[kind], kind
                    if number == WARM:
                        before = memory(server.process.pid)

            await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                await until_zero(client, name, 10)
            after = memory(server.process.pid)
            print(f"{before} KiB after {WARM} requests, {after} after {REQUESTS}")
            assert after < GROWTH * before
            assert [await answer(client, kind) for kind in range(KINDS)] == alone

    with serving.Process(folder, "--batch-size", "8", "--n-positions", "96", "--most-waiting", "1000") as server:
        asyncio.run(run(server))
        status, log = server.end()
        assert status == 0
        assert "Traceback" not in log, log
