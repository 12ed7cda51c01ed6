"""`vllm serve` of SmolLM2 with the plugin, driven by OpenAI's client (docs/vllm.md)."""

import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import serving
import tiny
import transformers

from jx_neuron import NeuronAutoModelForCausalLM, SamplingParams

pytestmark = pytest.mark.slow

NEW = 12
TEXTS = ["The capital of France is", "Once upon a time", "2 + 2 =", "def add(a, b):", "Water " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def hf(folder: Path) -> transformers.LlamaForCausalLM:
    return serving.demo_checkpoint(folder)


@contextmanager
def served(folder: Path, *options: str) -> Iterator[openai.OpenAI]:
    if not (python := os.environ.get("VLLM_PYTHON")):
        pytest.skip("VLLM_PYTHON names no Python that has vLLM and this package")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    log = folder.parent / f"vllm-{port}.log"
    settings = {"VLLM_PLUGINS": "jx_neuron", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--enforce-eager", *options], stdout=said, stderr=said, env=os.environ | settings
        )
    try:
        url = f"http://127.0.0.1:{port}"
        serving.wait_until_ready(url, 280, process)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=280) as client:
            yield client
    except Exception as error:
        raise AssertionError(log.read_text()[-6000:]) from error
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def greedy(client: openai.OpenAI, prompt: str | list[int]) -> list[int]:
    fields = dict(ignore_eos=True, return_token_ids=True)
    answer = client.completions.create(model="m", prompt=prompt, max_tokens=NEW, temperature=0, extra_body=fields)
    return answer.choices[0].token_ids


def ids_of(texts: list[str], folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def of_hf(hf: transformers.LlamaForCausalLM, prompt: list[int]) -> list[int]:
    hf.generation_config.eos_token_id = None
    return tiny.greedy(hf, np.array([prompt]), len(prompt) + NEW)[0, len(prompt) :].tolist()


def test_tokens_are_ours_and_hfs_and_64_at_once_are_those_of_each_alone(
    folder: Path, hf: transformers.LlamaForCausalLM
) -> None:
    prompts = ids_of(TEXTS, folder)
    rng = random.Random(0)
    many = [rng.choices(range(100, 40_000), k=rng.randint(1, 100)) for _ in range(64)]
    ours = NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=8, n_positions=128)
    sampling = SamplingParams(max_tokens=NEW, top_k=1, eos_token_id=-1)
    of_ours = [list(generation.ids) for generation in ours.generate(prompts, sampling)]
    assert of_ours == [of_hf(hf, prompt) for prompt in prompts]
    with served(folder) as client:
        assert [greedy(client, text) for text in TEXTS] == of_ours
        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(lambda prompt: greedy(client, prompt), many))
        assert together == [greedy(client, prompt) for prompt in many]


@pytest.mark.parametrize(
    "options",
    [
        ["--tensor-parallel-size", "3"],
        ["--additional-config", '{"backend": "host"}', "--max-num-seqs", "2"],
        ["--data-parallel-size", "2", "--max-num-seqs", "2"],
    ],
    ids=["tp", "host", "replicas"],
)
def test_meshes_backends_and_replicas_give_the_same_tokens(
    options: list[str], folder: Path, hf: transformers.LlamaForCausalLM
) -> None:
    prompts = ids_of(TEXTS[:4], folder)
    with served(folder, *options) as client, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: greedy(client, text), TEXTS[:4])) == [of_hf(hf, p) for p in prompts]
