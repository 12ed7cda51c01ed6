"""The server's answers, through its sockets, beside those of the model's own `generate`."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import serving

from jx_neuron import SamplingParams
from jx_neuron.artifact.folder import MANIFEST
from jx_neuron.serve import AsyncEngine, ServerSettings, app
from jx_neuron.serve.sizes import sizes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    return serving.model(serving.checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def client(model: object) -> Iterator[httpx.Client]:
    with serving.running(model) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def test_programs_are_for_many_callers_and_short_turns(tmp_path: Path) -> None:
    assert sizes("org/model", None, None, None) == dict(batch_size=(1, 2, 4, 8), context_length_estimate=[16, 32])
    assert sizes(tmp_path, 6, 20, None) == dict(batch_size=(1, 2, 4, 6), context_length_estimate=[16])
    assert sizes(tmp_path, 1, None, [64]) == dict(batch_size=(1,), context_length_estimate=[64])
    (tmp_path / MANIFEST).write_text("{}")  # a saved model, which has its own
    assert sizes(tmp_path, None, None, None) == {}
    assert sizes(tmp_path, 4, None, [64]) == dict(batch_size=4, context_length_estimate=[64])


def test_the_tokenizer_is_loaded_before_the_first_request(model: object) -> None:
    application = app(model, AsyncEngine(model), ServerSettings(names=("tiny",)))

    async def loaded() -> bool:
        async with application.router.lifespan_context(application):
            return "tokenizer" in vars(application.state.served)

    assert asyncio.run(loaded())


def post(client: httpx.Client, path: str, status: int = 200, **fields: object) -> dict:
    response = client.post(path, json=fields)
    assert response.status_code == status, response.text
    return response.json()


def complete(client: httpx.Client, status: int = 200, **fields: object) -> dict:
    return post(client, "/v1/completions", status, **{"prompt": "abc", "max_tokens": 8, "temperature": 0, **fields})


def chat(client: httpx.Client, status: int = 200, **fields: object) -> dict:
    messages = [{"role": "user", "content": "hello"}]
    chosen = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    return post(client, "/v1/chat/completions", status, **chosen)


def events(client: httpx.Client, path: str, **fields: object) -> list[dict]:
    with client.stream("POST", path, json={"stream": True, "temperature": 0, **fields}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


WITHOUT_SPECIAL = {str(id): -100.0 for id in range(95, 101)}  # of no text


def own(model: object, prompt: object, **sampling: object) -> object:
    return model.generate(prompt, SamplingParams(**{"max_tokens": 8, "temperature": 0, **sampling}))


def test_models_version_and_health(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "other"]
    assert cards[0]["max_model_len"] == 96
    assert client.get("/v1/models/other").json()["id"] == "other"
    assert client.get("/v1/models/absent").status_code == 404
    assert client.get("/health").status_code == 200
    assert client.get("/health").content == b""
    assert client.get("/version").json()["version"]


@pytest.mark.parametrize("prompt", ["abc", [65, 66, 67]], ids=["text", "ids"])
def test_a_completion_is_the_models_own(prompt: object, client: httpx.Client, model: object) -> None:
    body = complete(client, prompt=prompt)
    assert body["choices"][0]["text"] == own(model, prompt).text
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == dict(prompt_tokens=3, completion_tokens=8, total_tokens=11)


def test_several_prompts_times_n(client: httpx.Client, model: object) -> None:
    fields = dict(temperature=1.0, seed=3, top_k=20)
    body = complete(client, prompt=["abc", [70, 71]], n=2, return_token_ids=True, **fields)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    ids = [choice["token_ids"] for choice in body["choices"]]
    for number, prompt in enumerate(("abc", [70, 71])):
        answers = own(model, prompt, n=2, **fields).answers
        assert ids[2 * number : 2 * number + 2] == [list(answer.ids) for answer in answers]
    assert body["choices"][2]["prompt_token_ids"] == [70, 71]
    assert body["usage"]["completion_tokens"] == 32


def test_a_stream_joins_to_the_whole(client: httpx.Client) -> None:
    for path, fields in (
        ("/v1/completions", dict(prompt=["abc", "xy"], max_tokens=8, n=2, seed=1)),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content="hello")], max_tokens=8, n=2)),
    ):
        whole = post(client, path, temperature=0, **fields)
        texts, usage = [""] * len(whole["choices"]), None
        for event in events(client, path, **fields, stream_options=dict(include_usage=True)):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            usage = event.get("usage")
        if "message" in whole["choices"][0]:
            assert texts == [choice["message"]["content"] for choice in whole["choices"]]
        else:
            assert texts == [choice["text"] for choice in whole["choices"]]
        assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_usage_in_each_chunk(client: httpx.Client) -> None:
    options = dict(include_usage=True, continuous_usage_stats=True)
    chunks = events(
        client, "/v1/completions", prompt="abc", max_tokens=4, ignore_eos=True, stop=None, stream_options=options
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]
    assert chunks[-1]["choices"] == []


def test_echo_with_log_probabilities_as_lm_eval_reads_them(client: httpx.Client, model: object) -> None:
    rows = [[65, 66, 67, 68], [70, 71, 72]]
    body = complete(client, prompt=rows, max_tokens=1, logprobs=1, echo=True, seed=1234)
    scores = model.log_likelihoods([np.array(row) for row in rows])
    for choice, row, score in zip(body["choices"], rows, scores, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(row) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        np.testing.assert_allclose(logprobs["token_logprobs"][1:-1], score.logprobs, atol=1e-5)
        likeliest = [
            own_ == max(top.values())
            for own_, top in zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True)
        ]
        assert likeliest == score.likeliest.tolist()
        assert choice["text"].startswith("".join(logprobs["tokens"][:-1]))
        assert logprobs["text_offset"][-1] == len(row)


def test_echo_without_an_answer(client: httpx.Client) -> None:
    body = complete(client, max_tokens=0, echo=True, logprobs=0)
    assert body["choices"][0]["text"] == "abc"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == 3
    assert body["usage"]["completion_tokens"] == 0
    assert complete(client, 400, max_tokens=0)["error"]["param"] == "max_tokens"


def test_prompt_logprobs(client: httpx.Client, model: object) -> None:
    entries = complete(client, prompt=[65, 66, 67], prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    (score,) = model.log_likelihoods([np.array([65, 66, 67])])
    assert entries[0] is None
    assert entries[1]["66"]["logprob"] == pytest.approx(score.logprobs[0], abs=1e-5)
    assert entries[2]["67"]["decoded_token"] == "c"
    assert {1, 2} <= {one["rank"] for one in entries[1].values()}


def test_stop_strings_are_left_out_or_kept(client: httpx.Client) -> None:
    fields = dict(max_tokens=24, logit_bias=WITHOUT_SPECIAL)
    text = complete(client, **fields)["choices"][0]["text"]
    stop = text[9:12]
    before = text[: text.index(stop)]
    choice = complete(client, stop=["~absent~", stop], **fields)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (before, "stop", stop)
    kept = complete(client, **fields, stop=stop, include_stop_str_in_output=True)["choices"][0]["text"]
    assert kept == before + stop
    streamed = events(client, "/v1/completions", prompt="abc", stop=stop, **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == before


def test_special_tokens_are_left_out_or_kept(client: httpx.Client, model: object) -> None:
    fields = dict(logit_bias={str(id): 100.0 for id in (96, 97)}, max_tokens=4, return_token_ids=True)
    choice = complete(client, skip_special_tokens=False, **fields)["choices"][0]
    assert choice["text"] == "".join(model.tokenizer.convert_ids_to_tokens(choice["token_ids"]))
    assert choice["text"].startswith("<")
    assert complete(client, **fields)["choices"][0]["text"] == ""


def test_stop_tokens(client: httpx.Client) -> None:
    ids = complete(client, max_tokens=12, return_token_ids=True)["choices"][0]["token_ids"]
    choice = complete(client, max_tokens=12, stop_token_ids=[ids[5]], return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(ids[5]) + 1]
    assert choice["stop_reason"] == ids[5]
    assert choice["finish_reason"] == "stop"


def test_seeds_repeat_and_greedy_by_top_k(client: httpx.Client) -> None:
    fields = dict(temperature=1.5, max_tokens=12)
    first, again = (complete(client, seed=7, **fields)["choices"][0]["text"] for _ in range(2))
    assert first == again
    assert (
        complete(client, top_k=1, **fields)["choices"][0]["text"]
        == complete(client, max_tokens=12)["choices"][0]["text"]
    )


def test_a_chat_is_what_its_template_writes(client: httpx.Client) -> None:
    body = chat(client, logprobs=True, top_logprobs=2, logit_bias=WITHOUT_SPECIAL)
    message = body["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == complete(client, prompt="u:hello;a:", logit_bias=WITHOUT_SPECIAL)["choices"][0]["text"]
    entries = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == message["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 8
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]


def test_messages_in_their_forms(client: httpx.Client) -> None:
    parts = [dict(role="user", content=[dict(type="text", text="hel"), dict(type="text", text="lo")])]
    tokens = post(client, "/tokenize", messages=parts)["tokens"]
    assert post(client, "/detokenize", tokens=tokens)["prompt"] == "u:hel\nlo;a:".replace("\n", "")
    call = dict(id="1", type="function", function=dict(name="f", arguments='{"x": "y"}'))
    messages = [dict(role="assistant", tool_calls=[call]), dict(role="tool", content="z", tool_call_id="1")]
    tokens = post(client, "/tokenize", messages=messages, chat_template_kwargs=dict(suffix="!"))["tokens"]
    assert post(client, "/detokenize", tokens=tokens)["prompt"] == "a:y;t:z;a:!"
    last = [dict(role="user", content="q"), dict(role="assistant", content="so")]
    fields = dict(messages=last, continue_final_message=True, add_generation_prompt=False)
    assert post(client, "/detokenize", tokens=post(client, "/tokenize", **fields)["tokens"])["prompt"] == "u:q;a:so"


def test_responses(client: httpx.Client) -> None:
    fields = dict(input="hey", max_output_tokens=8, temperature=0)
    body = post(client, "/v1/responses", **fields)
    text = chat(client, messages=[dict(role="user", content="hey")])["choices"][0]["message"]["content"]
    assert len(text) > 4
    assert body["output"][0]["content"][0]["text"] == text
    assert body["status"] == "incomplete"
    assert body["usage"]["output_tokens"] == 8
    with client.stream("POST", "/v1/responses", json=fields | dict(stream=True)) as response:
        lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert [line["sequence_number"] for line in lines] == list(range(len(lines)))
    assert "".join(line["delta"] for line in lines if line["type"] == "response.output_text.delta") == text
    assert lines[-1]["response"]["output"][0]["content"][0]["text"] == text
    kept = post(client, "/v1/responses", 400, previous_response_id="resp_1", **fields)
    assert kept["error"]["param"] == "previous_response_id"


def test_tokens(client: httpx.Client) -> None:
    body = post(client, "/tokenize", prompt="abc", return_token_strs=True)
    assert body == dict(count=3, max_model_len=96, tokens=[65, 66, 67], token_strs=["a", "b", "c"])
    assert post(client, "/detokenize", tokens=[65, 66])["prompt"] == "ab"
    assert post(client, "/detokenize", 400, tokens=[101])["error"]["param"] == "tokens"
    info = client.get("/tokenizer_info").json()
    assert info["chat_template"] == serving.TEMPLATE
    assert info["eos_token"] == "<0>"


def test_metrics_have_vllms_names_and_count(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"vllm:{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_count",
    )
    before = [value(name) for name in names]
    complete(client, prompt=["abcd", "xyz"], n=2)
    assert [value(name) - former for name, former in zip(names, before, strict=True)] == [7, 32, 4, 2]
    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert 'vllm:cache_config_info{block_size="96",num_gpu_blocks="4"} 1.0' in client.get("/metrics").text
