"""Answers that a grammar or another mask forces, through the server and OpenAI's own client."""

import json
import re
from collections.abc import Iterator

import httpx
import openai
import pydantic
import pytest
import serving

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 4}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = serving.model(serving.checkpoint(tmp_path_factory.mktemp("tiny")), n_positions=448)
    with serving.running(model) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def complete(url: str, **fields: object) -> dict:
    response = httpx.post(
        f"{url}/v1/completions", json={"prompt": "abc", "temperature": 1, "seed": 1, **fields}, timeout=60
    )
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_choice_and_regex(url: str) -> None:
    choices = ["yes", "no (a+b)?", "1.5"]
    found = [complete(url, n=1, max_tokens=32, seed=seed, structured_outputs=dict(choice=choices)) for seed in range(6)]
    assert {choice["text"] for choice in found} <= set(choices)
    assert {choice["finish_reason"] for choice in found} == {"stop"}
    text = complete(url, max_tokens=32, structured_outputs=dict(regex=r"[0-9]{4}-[0-9]{2}"))["text"]
    assert re.fullmatch(r"\d{4}-\d{2}", text)


def test_n_answers_have_a_grammar_each(url: str) -> None:
    fields = dict(prompt=["a", "b"], n=2, max_tokens=16, temperature=1, structured_outputs=dict(regex="[a-f]{5}"))
    choices = httpx.post(f"{url}/v1/completions", json=fields, timeout=60).json()["choices"]
    assert all(re.fullmatch("[a-f]{5}", choice["text"]) for choice in choices)
    assert len({choice["text"] for choice in choices}) > 1


def test_a_schema_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=6)
        big: bool

    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=City, max_tokens=120, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, City)
    response = client.responses.parse(model="tiny", input="hello", text_format=City, max_output_tokens=400)
    assert isinstance(response.output_parsed, City)


def test_a_call_is_forced(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        fields = dict(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=120, seed=1)
        fields |= dict(parallel_tool_calls=False)
        answer = client.chat.completions.create(**fields).choices[0]
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
        assert answer.finish_reason == reason
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **fields)]
        streamed = [call for delta in deltas for call in delta.tool_calls or []]
        assert [(one.function.name, one.function.arguments) for one in streamed] == [
            (call.function.name, call.function.arguments)
        ]


def test_a_call_in_the_templates_format_is_read(client: openai.OpenAI) -> None:
    regex = r'ok <tool_call>\{"name": "weather", "arguments": \{"city": "[a-z]{3}"\}\}</tool_call>'
    fields = dict(model="tiny", messages=HELLO, tools=[WEATHER], max_tokens=120, seed=1)
    fields |= dict(extra_body=dict(structured_outputs=dict(regex=regex)))
    answer = client.chat.completions.create(**fields).choices[0]
    assert answer.message.content.strip() == "ok"
    assert len(json.loads(answer.message.tool_calls[0].function.arguments)["city"]) == 3
    assert answer.finish_reason == "tool_calls"
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.name == "weather"
    fields = dict(tools=[dict(type="function", **WEATHER["function"])], tool_choice="required")
    fields |= dict(parallel_tool_calls=False, max_output_tokens=400)
    response = client.responses.create(model="tiny", input="hello", **fields)
    assert response.output[0].type == "function_call"
    assert set(json.loads(response.output[0].arguments)) == {"city"}


def test_min_tokens_bad_words_and_allowed_tokens(url: str) -> None:
    ending = dict(max_tokens=12, temperature=0, return_token_ids=True, logit_bias={"95": 100})
    assert complete(url, **ending)["token_ids"] == [95]
    assert len(complete(url, min_tokens=5, **ending)["token_ids"]) == 6
    text = complete(url, max_tokens=40, allowed_token_ids=[65, 66])["text"]
    assert set(text) == {"a", "b"}
    assert "ab" not in complete(url, max_tokens=40, allowed_token_ids=[65, 66], bad_words=["ab"])["text"]


def test_what_is_no_grammar_is_refused(url: str) -> None:
    several = dict(regex="a", choice=["b"])
    for outputs in (dict(regex="("), dict(json={"type": "nonsense"}), dict(json="{"), dict(), several):
        response = httpx.post(f"{url}/v1/completions", json=dict(prompt="a", structured_outputs=outputs))
        assert response.status_code == 400, outputs
