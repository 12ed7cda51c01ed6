"""Clients that go away or read nothing, and SIGTERM: nothing hangs, and no slot is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import serving

LONG = dict(prompt="abc", max_tokens=90, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving.running(serving.model(folder)) as url, httpx.Client(base_url=url, timeout=120) as client:
        client.post("/v1/completions", json=LONG).raise_for_status()
        yield client


def load(client: httpx.Client) -> float:
    """The answers that run or wait."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(r"vllm:num_requests_\w+{", line))


def wait_until_idle(client: httpx.Client, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while load(client):
        assert time.monotonic() < end, "a slot is lost"
        time.sleep(0.05)


def opened(client: httpx.Client, fields: dict, buffer: int | None = None, unsent: int = 0) -> socket.socket:
    """A connection on which a request was sent, but for its last bytes, and nothing read."""
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((client.base_url.host, client.base_url.port))
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection.sendall((head + body)[: len(head + body) - unsent])
    return connection


def all_of(connection: socket.socket, seconds: float) -> bytes:
    """What arrives until the server closes the connection, or resets it."""
    connection.settimeout(seconds)
    parts = []
    with connection, suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(stream: bool, client: httpx.Client) -> None:
    connections = [opened(client, LONG | dict(stream=stream, n=2)) for _ in range(6)]
    time.sleep(0.1)
    for connection in connections:
        connection.close()
    wait_until_idle(client)
    assert client.post("/v1/completions", json=LONG | dict(max_tokens=2)).is_success


def test_one_that_reads_nothing_stalls_nobody(folder: Path) -> None:
    with (
        serving.running(serving.model(folder), write_seconds=1.0) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        many = LONG | dict(n=4, stream=True, logprobs=20, return_token_ids=True)
        slow = [opened(client, many, buffer=1024) for _ in range(2)]
        for _ in range(3):
            assert client.post("/v1/completions", json=LONG | dict(max_tokens=4)).is_success
        wait_until_idle(client)
        for connection in slow:
            connection.close()


def test_idle_connections_are_in_nobodys_way(client: httpx.Client) -> None:
    address = (client.base_url.host, client.base_url.port)
    idle = [socket.create_connection(address) for _ in range(200)]
    assert client.post("/v1/completions", json=LONG | dict(max_tokens=2)).is_success
    for connection in idle:
        connection.close()


def test_many_at_once_each_as_alone(client: httpx.Client) -> None:
    def ask(number: int) -> str:
        fields = dict(prompt="abcdefgh"[: 1 + number % 8], max_tokens=6, temperature=1.0, seed=number, top_k=10)
        response = client.post("/v1/completions", json=fields)
        response.raise_for_status()
        return response.json()["choices"][0]["text"]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == [ask(number) for number in range(32)]
    wait_until_idle(client)


@pytest.fixture
def server(folder: Path) -> Iterator[serving.Process]:
    with serving.Process(folder, "--batch-size", "4", "--n-positions", "96", "--drain-seconds", "20") as server:
        yield server


@pytest.mark.slow
def test_sigterm_under_load_ends_all_and_exits_with_0(server: serving.Process, folder: Path) -> None:
    assert server.about["model"] == folder.name
    statuses: list[object] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            try:
                if number % 2:
                    with client.stream("POST", "/v1/completions", json=LONG | dict(stream=True)) as response:
                        ended = response.read().endswith(b"data: [DONE]\n\n")
                        statuses.append(ended if response.status_code == 200 else response.status_code)
                else:
                    statuses.append(client.post("/v1/completions", json=LONG).status_code)
            except httpx.ConnectError:
                statuses.append("refused")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    status, errors = server.end()
    for thread in threads:
        thread.join(60)
    assert status == 0, errors
    assert len(statuses) == 24
    assert set(statuses) <= {200, 503, "refused", True}, statuses
    assert {200, True} & set(statuses)


@pytest.mark.slow
def test_ctrl_c_drains_too(folder: Path) -> None:
    assert serving.Process(folder).end(signal.SIGINT)[0] == 0


@pytest.mark.slow
def test_a_port_in_use_is_an_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "jx_neuron", "serve", str(folder), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as a thousand connections take."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.usefixtures("many_files")
def test_kill_9_of_clients_and_a_thousand_idle_connections(server: serving.Process) -> None:
    code = "import httpx, sys; httpx.post(sys.argv[1] + '/v1/completions', content=sys.argv[2], timeout=60)"
    with httpx.Client(base_url=server.url, timeout=60) as client:
        address = (client.base_url.host, client.base_url.port)
        idle = [socket.create_connection(address) for _ in range(1000)]
        bodies = [json.dumps(LONG | dict(n=40, stream=stream)) for stream in (False, True, False)]
        callers = [subprocess.Popen([sys.executable, "-c", code, server.url, body]) for body in bodies]
        while load(client) < 3 * 40 - 10:
            time.sleep(0.05)
        for caller in callers:
            os.kill(caller.pid, signal.SIGKILL)
            caller.wait()
        assert client.post("/v1/completions", json=LONG).is_success
        wait_until_idle(client, 5)  # 120 answers would take longer
        for connection in idle:
            connection.close()
    assert server.end()[0] == 0


@pytest.mark.slow
def test_slow_readers_delay_themselves_alone(server: serving.Process) -> None:
    many = LONG | dict(n=64, stream=True, logprobs=20)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        none = [opened(client, many, buffer=1024) for _ in range(2)]
        slow = opened(client, many | dict(n=2), buffer=1024)
        wait_until_idle(client, 120)  # nothing is read, and every answer ends
        assert client.post("/v1/completions", json=LONG).is_success
        slowly = b""
        while not slowly.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            part = slow.recv(512)
            assert part, "the server closed the connection"
            slowly += part
            time.sleep(0.002)
        slow.close()
        time.sleep(65)
        for connection in none:  # the rest was dropped after a minute
            assert b"[DONE]" not in all_of(connection, 10)
    assert server.end()[0] == 0


@pytest.mark.slow
def test_half_sent_bodies_end_in_time(server: serving.Process) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        began = time.monotonic()
        halves = [opened(client, LONG, unsent=20) for _ in range(100)]
        assert client.post("/v1/completions", json=LONG).is_success
        for connection in halves:
            assert all_of(connection, 60).startswith(b"HTTP/1.1 408 ")
        assert 25 < time.monotonic() - began < 45
        again = [opened(client, LONG, unsent=20) for _ in range(100)]
        began = time.monotonic()
        assert server.end()[0] == 0
        assert time.monotonic() - began < 45
        for connection in again:
            assert not all_of(connection, 1).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
@pytest.mark.parametrize(("most", "seconds"), [(None, 5), (2**24, 8)], ids=["too long", "read"])
def test_prompts_of_10_mb(most: int | None, seconds: float, folder: Path) -> None:
    options = [] if most is None else ["--most-bytes", str(most)]
    prompts = ["a b c " * 1_700_000, [5] * 5_000_000, ["a"] * 2_500_000, [5] * 5_000_000 + ["a"]]
    bodies = [json.dumps(dict(prompt=prompt)) for prompt in prompts]
    chat = [dict(role="user", content="a")] * 280_000
    bodies.append(json.dumps(dict(messages=chat)))
    with (
        serving.Process(folder, "--n-positions", "96", *options) as server,
        httpx.Client(base_url=server.url, timeout=300) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        paths = ["completions"] * 4 + ["chat/completions"]
        sent = [pool.submit(client.post, f"/v1/{path}", content=body) for path, body in zip(paths, bodies, strict=True)]
        longest = 0.0
        while not all(one.done() for one in sent):
            began = time.monotonic()
            assert client.post("/v1/completions", json=LONG | dict(max_tokens=2)).is_success
            longest = max(longest, time.monotonic() - began)
        expected = [413] * 5 if most is None else [400] * 5
        assert [one.result().status_code for one in sent] == expected
        print(f"another request took at most {longest:.2f} s")
        assert longest < seconds
        assert server.end()[0] == 0
