"""Requests that the server refuses: the status, the field at fault, and that it goes on."""

import json
import random
import socket
import time
from collections.abc import Iterator

import httpx
import pydantic
import pytest
import serving
import tokenizers
import transformers

from jx_neuron.serve.protocol import Body, ChatRequest, CompletionRequest, DetokenizeRequest
from jx_neuron.serve.responses import ResponsesRequest
from jx_neuron.serve.token_sizes import token_sizes

HELLO = [{"role": "user", "content": "hello"}]
MANY = 2_000
BOTH_ENDS = dict(continue_final_message=True, add_generation_prompt=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    return serving.model(serving.checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def client(model: object) -> Iterator[httpx.Client]:
    limits = dict(most_bytes=64 * 1024, body_seconds=1.0, most_answers=8)
    with serving.running(model, **limits) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", dict(prompt="a", frobnicate=1), "frobnicate"),
        ("completions", dict(prompt="a", maxTokens=1), "maxTokens"),
        ("completions", dict(prompt="a", stop=[""]), "stop"),
        ("completions", dict(prompt="a", logit_bias={"1": "a"}), "logit_bias"),
        ("completions", dict(prompt="a", temperature=-1), "temperature"),
        ("completions", dict(prompt="a", top_p=0), "top_p"),
        ("completions", dict(prompt="a", n=9), "n"),
        ("completions", dict(prompt=["a"] * 9), "n"),
        ("completions", dict(prompt=[]), "prompt"),
        ("completions", dict(prompt=""), "prompt"),
        ("completions", dict(prompt="a", suffix="b"), "suffix"),
        ("completions", dict(prompt="a", best_of=3, n=1), "best_of"),
        ("completions", dict(prompt="a", logprobs=21), "logprobs"),
        ("completions", dict(prompt="a", logit_bias={"a": 1}), "logit_bias"),
        ("completions", dict(prompt="a", use_beam_search=True), "use_beam_search"),
        ("completions", dict(prompt="a", allowed_token_ids=[101]), "allowed_token_ids"),
        ("chat/completions", dict(messages=[]), "messages"),
        ("chat/completions", dict(messages=HELLO, chat_template="{{ 1 }}"), "chat_template"),
        ("chat/completions", dict(messages=HELLO, chat_template_kwargs=dict(tools=[])), "chat_template_kwargs"),
        ("chat/completions", dict(messages=HELLO, top_logprobs=2), "top_logprobs"),
        ("chat/completions", dict(messages=HELLO, modalities=["audio"]), "modalities"),
        ("chat/completions", dict(messages=HELLO, **BOTH_ENDS), "continue_final_message"),
        ("chat/completions", dict(messages=HELLO, tool_choice="required"), "tool_choice"),
        ("chat/completions", dict(messages=HELLO, tool_choice=dict(function=dict(name="f"))), "tool_choice"),
        ("responses", dict(input=[dict(type="input_image")]), "input"),
    ],
)  # fmt: skip
def test_a_field_at_fault_is_named(path: str, fields: dict, param: str, client: httpx.Client) -> None:
    response = client.post(f"/v1/{path}", json=fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, dict(prompt=[5] * MANY + ["a"])),
        (CompletionRequest, dict(prompt=[["a"]] * MANY)),
        (CompletionRequest, dict(prompt="a", stop=[""] * 64)),
        (CompletionRequest, dict(prompt="a", logit_bias={str(n): "a" for n in range(MANY)})),
        (CompletionRequest, dict(prompt="a", allowed_token_ids=["a"] * MANY)),
        (CompletionRequest, dict(prompt="a", **{f"x{n}": n for n in range(MANY)})),
        (ChatRequest, dict(messages=[5] * MANY)),
        (ChatRequest, dict(messages=[dict(role="user", content=[5] * MANY)])),
        (ChatRequest, dict(messages=[dict(role="user") | {f"x{n}": n for n in range(MANY)}])),
        (DetokenizeRequest, dict(tokens=["a"] * MANY)),
        (ResponsesRequest, dict(input=[5] * MANY)),
    ],
)
def test_many_faults_are_few_errors(kind: type[Body], fields: dict) -> None:
    with pytest.raises(pydantic.ValidationError) as bad:
        kind.model_validate(fields)
    assert bad.value.error_count() <= 4  # of the branches of a union


def test_no_address_is_opened(client: httpx.Client) -> None:
    image = [dict(type="image_url", image_url=dict(url="file:///etc/passwd"))]
    response = client.post("/v1/chat/completions", json=dict(messages=[dict(role="user", content=image)]))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages.0.content")


def test_too_long_for_the_model(client: httpx.Client) -> None:
    for fields in (dict(prompt="a" * 96), dict(prompt="a", max_tokens=96)):
        error = client.post("/v1/completions", json=fields).json()["error"]
        assert error["code"] == "context_length_exceeded"
    assert client.post(
        "/v1/completions", json=dict(prompt="a" * 200, truncate_prompt_tokens=-1, max_tokens=1)
    ).is_success


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", dict(prompt=[5] * 97 + ["a"])),
        ("completions", dict(prompt="a" * 5000)),
        ("chat/completions", dict(messages=[dict(role="user", content=1)] * 97)),
        ("chat/completions", dict(messages=[dict(role="user", content="a" * 5000)])),
        ("responses", dict(input=[1] * 97)),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_read_whole(path: str, fields: dict, client: httpx.Client) -> None:
    answer = client.post(f"/v1/{path}", json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_long_text_that_is_truncated_is_not_refused(client: httpx.Client) -> None:
    fields = dict(prompt="a" * 5000 + "b", max_tokens=1, truncate_prompt_tokens=1)
    assert client.post("/v1/completions", json=fields).json()["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("composes", [False, True])
def test_no_text_has_fewer_tokens_than_is_counted(composes: bool) -> None:
    backend, rng = tokenizers.Tokenizer(tokenizers.models.BPE()), random.Random(0)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if composes:
        backend.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end of all>"], show_progress=False)
    backend.train_from_iterator(["aaaa aaaa abab \u1f82\u1f82 e\u0301"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    sizes = token_sizes(tokenizer)
    pieces = ["aaaa", "ab", " ", "    ", "z", "<end of all>", "\u03b1\u0313\u0300\u0345", "\u1f82", "e\u0301"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 20)))
        assert sizes.fewest(text.encode()) <= len(tokenizer(text)["input_ids"])
    assert sizes.fewest(b"aaaa" * 1000) >= (100 if composes else 300)
    backend.normalizer = tokenizers.normalizers.Strip()
    assert token_sizes(transformers.PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_ignored_fields_are_listed(client: httpx.Client) -> None:
    response = client.post(
        "/v1/completions", json=dict(prompt="a", user="me", metadata={}, suffix=None, best_of=1, max_tokens=1)
    )
    assert response.is_success
    assert response.headers["x-ignored-fields"] == "user, metadata"


def test_another_model_and_another_route(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json=dict(prompt="a", model="gpt-4"))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'{"prompt": NaN}', b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"\xff", b'"\\ud800"'],
    ids=["empty", "half", "list", "nan", "deep", "bytes", "surrogate"],
)  # fmt: skip
def test_bodies_that_are_no_requests(body: bytes, client: httpx.Client) -> None:
    assert client.post("/v1/completions", content=body).status_code == 400


def test_half_a_surrogate_pair_is_no_text(client: httpx.Client) -> None:
    response = client.post("/v1/completions", content=b'{"prompt": "a\\ud800"}')
    assert response.status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_refused(chunked: bool, client: httpx.Client) -> None:
    body = json.dumps(dict(prompt="a" * 100_000)).encode()
    content = iter([body[:50_000], body[50_000:]]) if chunked else body
    response = client.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def raw(client: httpx.Client, sent: bytes, seconds: float = 10) -> bytes:
    """What the server answers to bytes of a socket, until it closes it."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=seconds) as connection:
        connection.sendall(sent)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "begins"),
    [
        (b"", b""),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b""),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"HTTP/1.1 408 "),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
    ],
    ids=["nothing", "half a head", "half a body", "no HTTP"],
)
def test_what_is_sent_by_half_ends_in_time(sent: bytes, begins: bytes, client: httpx.Client) -> None:
    began = time.monotonic()
    assert raw(client, sent).startswith(begins)
    assert time.monotonic() - began < 5


def test_a_connection_in_use_outlives_the_time_for_headers(client: httpx.Client) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(1.5)


def test_a_key_is_asked_for(model: object) -> None:
    with serving.running(model, api_keys=("one", "two")) as url, httpx.Client(base_url=url, timeout=60) as client:
        for header in ({}, {"Authorization": "Bearer on"}, {"Authorization": "one"}, {"Authorization": "Bearer \xff"}):
            encoded = {name: value.encode("latin-1") for name, value in header.items()}
            response = client.get("/v1/models", headers=encoded)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post("/tokenize", json=dict(prompt="a")).status_code == 401
        for key in ("one", "two"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).is_success
        assert client.get("/health").is_success
        assert client.get("/metrics").is_success


def test_a_full_queue_says_when_to_come_again(model: object) -> None:
    with serving.running(model, most_waiting=0) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/completions", json=dict(prompt=["a"] * 4)).is_success  # as many as there are slots
        response = client.post("/v1/completions", json=dict(prompt=["a"] * 5))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_model_without_a_template_or_a_tokenizer(tmp_path: object) -> None:
    import tiny

    bare = serving.model(tiny.saved("llama", tmp_path / "bare"))
    with serving.running(bare) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/completions", json=dict(prompt=[5, 6], max_tokens=2, temperature=0)).is_success
        for fields in (dict(prompt="a"), dict(prompt=[5, 6], stop="x")):
            response = client.post("/v1/completions", json=fields)
            assert response.status_code == 400
            assert "token ids" in response.json()["error"]["message"]
    plain = serving.model(serving.checkpoint(tmp_path / "plain", template=None))
    with serving.running(plain) as url, httpx.Client(base_url=url, timeout=60) as client:
        response = client.post("/v1/chat/completions", json=dict(messages=HELLO))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
