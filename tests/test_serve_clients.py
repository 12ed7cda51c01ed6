"""OpenAI's own client, litellm, guidellm and lm-eval against `jx-neuron serve --demo`, none of them modified.

LITELLM_PYTHON, GUIDELLM_PYTHON and LM_EVAL_PYTHON name the Pythons that have them (docs/serving.md).
"""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
import serving

from jx_neuron import LlamaForSampling, NeuronConfig, SamplingParams
from jx_neuron.checkpoint.demo import demo_model

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
PROMPTS = [
    PROMPT,
    "Once upon a time",
    "2 + 2 =",
    "Water boils at",
    "The moon is",
    "def add(a, b):",
    "Cats",
    "My name is",
]
ASK = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Process]:
    with serving.Process("--demo") as server:
        yield server


@pytest.fixture(scope="module")
def name(server: serving.Process) -> str:
    return server.about["model"]


@pytest.fixture(scope="module")
def client(server: serving.Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> LlamaForSampling:
    return LlamaForSampling.from_pretrained(
        demo_model(), n_positions=512, neuron_config=NeuronConfig(output_all_logits=True)
    )


def test_completions_of_openai(client: openai.OpenAI, name: str, model: LlamaForSampling) -> None:
    fields = dict(model=name, prompt=PROMPT, max_tokens=16, temperature=0)
    answer = client.completions.create(**fields, echo=True, logprobs=2)
    (choice,) = answer.choices
    own = model.generate(PROMPT, SamplingParams(max_tokens=16, temperature=0))
    assert choice.text == PROMPT + own.text
    assert answer.usage.total_tokens == len(own.prompt_ids) + 16
    assert "".join(choice.logprobs.tokens) == choice.text
    (scores,) = model.log_likelihoods([np.array([*own.prompt_ids, *own.ids])])
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], scores.logprobs, atol=1e-3)
    begin = own.text[10:14]
    stopped = client.completions.create(**fields, stop=begin).choices[0]
    assert (stopped.text, stopped.finish_reason) == (own.text[: own.text.index(begin)], "stop")


def test_chats_of_openai(client: openai.OpenAI, name: str) -> None:
    assert [card.id for card in client.models.list()] == [name]
    fields = dict(model=name, messages=ASK, max_tokens=24)
    whole = client.chat.completions.create(**fields, temperature=0, logprobs=True, top_logprobs=3)
    content, entries = whole.choices[0].message.content, whole.choices[0].logprobs.content
    assert "Paris" in content
    assert "".join(entry.token for entry in entries).removesuffix("<|im_end|>") == content
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in entries)
    *chunks, last = client.chat.completions.create(
        **fields, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    several = [client.chat.completions.create(**fields, n=3, seed=5) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in several]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    response = client.responses.create(model=name, input=ASK[0]["content"], max_output_tokens=24, temperature=0)
    assert response.output_text == content


def test_tools_and_schemas_of_openai(client: openai.OpenAI, name: str) -> None:
    fields = dict(model=name, messages=ASK, tools=[WEATHER], max_tokens=200, temperature=0)
    assert client.chat.completions.create(**fields).choices[0].finish_reason in ("stop", "tool_calls", "length")
    asked = client.chat.completions.create(**fields, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = asked.message.tool_calls
    assert (call.function.name, asked.finish_reason) == ("weather", "tool_calls")
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    told = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    answer = client.chat.completions.create(**fields | dict(messages=[*ASK, asked.message, told]), tool_choice="none")
    assert answer.choices[0].message.content

    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=20)
        capital: bool

    fields = dict(model=name, messages=ASK, response_format=City, max_tokens=100, temperature=0)
    assert isinstance(client.chat.completions.parse(**fields).choices[0].message.parsed, City)
    with client.chat.completions.stream(**fields) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


def test_the_asynchronous_client_of_openai(client: openai.OpenAI, name: str) -> None:
    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", timeout=300) as several:

            async def one(prompt: str) -> str:
                fields = dict(model=name, prompt=prompt, max_tokens=16, temperature=0)
                chunks = [chunk async for chunk in await several.completions.create(stream=True, **fields)]
                return "".join(chunk.choices[0].text for chunk in chunks)

            return await asyncio.gather(*map(one, PROMPTS))

    alone = [client.completions.create(model=name, prompt=prompt, max_tokens=16, temperature=0) for prompt in PROMPTS]
    assert asyncio.run(all_at_once()) == [answer.choices[0].text for answer in alone]


def test_errors_of_openai(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=ASK)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=name, messages=ASK, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=name, prompt=[5] * 4000)
    assert long.value.code == "context_length_exceeded"


def client_of(variable: str, *arguments: object, cwd: Path | None = None) -> str:
    """What a client prints, run by the Python that an environment variable names."""
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} names no Python")
    done = subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


LITELLM = """
import asyncio, json, sys
import litellm

url, name, messages, tool, schema = sys.argv[1:3] + [json.loads(one) for one in sys.argv[3:]]
at = dict(api_base=url + "/v1", api_key="none", temperature=0, timeout=300)
chat = dict(at, messages=messages, max_tokens=24)

async def several():
    return await asyncio.gather(*(litellm.acompletion(model="hosted_vllm/" + name, **chat) for _ in range(4)))

def text(answer):
    return answer.choices[0].message.content

usage = dict(stream=True, stream_options={"include_usage": True})
chunks = list(litellm.completion(model="hosted_vllm/" + name, **usage, **chat))
forced = dict(chat, max_tokens=200, tools=[tool], tool_choice="required", parallel_tool_calls=False)
call, = litellm.completion(model="openai/" + name, **forced).choices[0].message.tool_calls
formatted = dict(type="json_schema", json_schema=dict(name="city", schema=schema))
print("RESULT", json.dumps(dict(
    chats=[text(litellm.completion(model=provider + name, **chat)) for provider in ("hosted_vllm/", "openai/")],
    several=[text(answer) for answer in asyncio.run(several())],
    streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    tokens=[chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)][-1],
    arguments=json.loads(call.function.arguments),
    schema=json.loads(text(litellm.completion(
        model="hosted_vllm/" + name, **dict(chat, max_tokens=100), response_format=formatted))),
    completion=litellm.text_completion(
        model="text-completion-openai/" + name, prompt=messages[0]["content"], max_tokens=8, **at).choices[0].text,
)))
"""


def test_litellm(client: openai.OpenAI, server: serving.Process, name: str) -> None:
    given = [json.dumps(one) for one in (ASK, WEATHER, CITY)]
    printed = client_of("LITELLM_PYTHON", "-c", LITELLM, server.url, name, *given)
    result = json.loads(printed.partition("RESULT ")[2])
    own = client.chat.completions.create(model=name, messages=ASK, max_tokens=24, temperature=0)
    content = own.choices[0].message.content
    assert {*result["chats"], *result["several"], result["streamed"]} == {content}
    assert result["tokens"] == own.usage.completion_tokens
    jsonschema.validate(result["arguments"], CITY)
    jsonschema.validate(result["schema"], CITY)
    fields = dict(model=name, prompt=ASK[0]["content"], max_tokens=8, temperature=0)
    assert result["completion"] == client.completions.create(**fields).choices[0].text


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(route: str, server: serving.Process, tasks: Path, tmp_path: Path) -> None:
    options = [
        "--backend", f"kind=openai_http,target={server.url},request_format={route}",
        "--tokenizer", f"kind=huggingface_auto,model={tasks / 'hf'}",
        "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=12",
        "--profile", "kind=concurrent,streams=4",
        "--constraint", "kind=max_requests,count=12",
        "--output", f"kind=json,path={tmp_path / 'benchmarks.json'}",
    ]  # fmt: skip
    client_of("GUIDELLM_PYTHON", "-m", "guidellm", "run", "--disable-console", *options, cwd=tmp_path)
    (benchmark,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"]) == (12, [])
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {12}


QUESTIONS = [
    ("The capital of France is", ["London", "Paris", "Berlin"], 1),
    ("The opposite of hot is", ["cold", "blue", "seven"], 0),
    ("Two plus two is", ["five", "nine", "four"], 2),
    ("Dogs bark and cats", ["miaow", "swim in the sea every day", "fly"], 0),
    ("The sun rises in the", ["west", "east", "night"], 1),
    ("Water freezes at", ["0 degrees Celsius", "70 degrees Celsius", "noon"], 0),
    ("A triangle has", ["four sides", "three sides", "no sides at all"], 1),
    ("The author of Hamlet is", ["Newton", "Napoleon", "William Shakespeare"], 2),
    ("The largest planet is", ["Jupiter", "the Moon", "Paris"], 0),
    ("Bees make", ["milk", "honey", "bread"], 1),
]
TASK = dict(dataset_path="json", test_split="train", num_fewshot=0, metadata=dict(version=1))
TASKS = [
    TASK
    | dict(
        task="choices", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}", metric_list=[dict(metric="acc"), dict(metric="acc_norm")],
    ),
    TASK
    | dict(
        task="answers", output_type="generate_until", doc_to_text="{{question}}", doc_to_target=" {{choices[answer]}}",
        generation_kwargs=dict(until=["\n", "."], max_gen_toks=16), metric_list=[dict(metric="exact_match")],
    ),
]  # fmt: skip
WITH_OURS = "import jx_neuron.integrations.lm_eval; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks of local data, and HF's model of the demo's weights in float32."""
    folder = tmp_path_factory.mktemp("tasks")
    data = [dict(question=question, choices=choices, answer=answer) for question, choices, answer in QUESTIONS]
    (folder / "questions.json").write_text("\n".join(map(json.dumps, data)))
    for task in TASKS:
        data_files = dict(data_files=str(folder / "questions.json"))
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task | dict(dataset_kwargs=data_files)))
    serving.demo_checkpoint(folder / "hf")
    return folder


def evaluated(tasks: Path, model: str, arguments: str, *how: str) -> tuple[dict, dict]:
    """lm-eval's scores of each task, and what the model gave for each of its questions."""
    results = tasks / model
    options = ["--tasks", "choices,answers", "--include_path", tasks, "--limit", "8", "--batch_size", "4"]
    options += ["--log_samples", "--output_path", results]
    client_of("LM_EVAL_PYTHON", *how, "--model", model, "--model_args", arguments, *options, cwd=tasks)
    (scores,) = results.glob("**/results_*.json")
    samples = {
        path.name.split("_")[1]: [json.loads(line)["resps"] for line in path.read_text().splitlines()]
        for path in results.glob("**/samples_*.jsonl")
    }
    return json.loads(scores.read_text())["results"], samples


def test_lm_eval_gives_the_scores_of_hf_and_of_our_adapter(server: serving.Process, name: str, tasks: Path) -> None:
    at = f"model={name},base_url={server.url}/v1/completions,num_concurrent=2"
    scores, samples = evaluated(tasks, "local-completions", at, "-m", "lm_eval")
    for model, arguments, *how in (
        ("hf", f"pretrained={tasks / 'hf'},dtype=float32", "-m", "lm_eval"),
        ("jx-neuron", f"pretrained={demo_model()},n_positions=512", "-c", WITH_OURS),
    ):
        expected, answers = evaluated(tasks, model, arguments, *how)
        for task in ("choices", "answers"):
            numbers = {key: value for key, value in expected[task].items() if isinstance(value, float)}
            assert numbers
            assert {key: scores[task][key] for key in numbers} == numbers
        assert 0 < scores["answers"]["exact_match,none"] < 1
        assert samples["answers"] == answers["answers"]
        for ours, theirs in zip(samples["choices"], answers["choices"], strict=True):
            for ((logprob, greedy),), ((of_other, greedy_of_other),) in zip(ours, theirs, strict=True):
                assert float(logprob) == pytest.approx(float(of_other), abs=1e-3)
                assert greedy == greedy_of_other
