"""vLLM with the plugin, in the virtual environment whose Python VLLM_PYTHON names (docs/vllm.md)."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import serving
import tiny
import torch

from jx_neuron import SamplingParams

HOST = {"backend": "host", "output_all_logits": True}
RUN = """
import json, sys

def answers(outputs):
    return [list(answer.token_ids) for output in outputs for answer in output.outputs]

if __name__ == "__main__":
    from vllm import LLM, SamplingParams as P
    from vllm.sampling_params import StructuredOutputsParams
    folder, prompts, more = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="float32", max_model_len=96, max_num_seqs=4, max_num_batched_tokens=48,
              enforce_eager=True, **more)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    whole = dict(max_tokens=8, ignore_eos=True)
    greedy = llm.generate(prompts, P(temperature=0, logprobs=2, prompt_logprobs=1, **whole))
    result = dict(
        greedy=answers(greedy),
        device=answers(llm.generate(prompts, P(temperature=0, **whole))),
        logprobs=[[d[t].logprob for t, d in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)] for o in greedy],
        of_prompts=[[d[t].logprob for t, d in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])] for o in greedy],
        seeded=answers(llm.generate(prompts, P(temperature=0.8, top_k=20, seed=7, **whole))),
        penalized=answers(llm.generate(
            prompts, P(temperature=0, repetition_penalty=1.5, presence_penalty=1.0, **whole))),
        several=answers(llm.generate(prompts[:1], P(temperature=0.8, seed=7, n=3, **whole))),
        regex=llm.generate(["ab"], P(temperature=0, max_tokens=8,
            structured_outputs=StructuredOutputsParams(regex="[xyz]{3}")))[0].outputs[0].text,
    )
    print("RESULT", json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.checkpoint(tmp_path_factory.mktemp("vllm"))


def run(folder: Path, prompts: list[list[int]], **more: object) -> dict:
    if not (python := os.environ.get("VLLM_PYTHON")):
        pytest.skip("VLLM_PYTHON names no Python that has vLLM and this package")
    script = folder.parent / "run.py"
    script.write_text(RUN)
    environment = os.environ | {"VLLM_PLUGINS": "jx_neuron", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(script), str(folder), json.dumps(prompts), json.dumps(more)],
        capture_output=True, text=True, check=False, env=environment, cwd=folder.parent,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"tensor_parallel_size": 2}, {"additional_config": HOST}])
def test_vllm_gives_what_hf_and_this_package_give(folder: Path, more: dict) -> None:
    prompts = [tiny.prompts(1, length)[0].tolist() for length in (1, 5, 33, 40, 70, 12)]
    result = run(folder, prompts, **more)
    hf, ours = tiny.model("llama"), serving.model(folder)
    greedy = [tiny.greedy(hf, np.array([prompt]), len(prompt) + 8)[0, len(prompt) :].tolist() for prompt in prompts]
    assert result["greedy"] == result["device"] == greedy
    for prompt, answer, logprobs, of_prompt in zip(
        prompts, greedy, result["logprobs"], result["of_prompts"], strict=True
    ):
        of_hf = torch.log_softmax(torch.tensor(tiny.logits(hf, np.array([prompt + answer]))[0]), -1)
        expected = [float(of_hf[at, token]) for at, token in enumerate((prompt + answer)[1:])]
        assert of_prompt + logprobs == pytest.approx(expected, abs=1e-3)

    def generated(**sampling: object) -> list[list[int]]:
        params = SamplingParams(max_tokens=8, eos_token_id=-1, **sampling)
        return [list(g.ids) for g in ours.generate(prompts, params)]

    assert result["seeded"] == generated(temperature=0.8, top_k=20, seed=7)
    assert result["penalized"] == generated(top_k=1, repetition_penalty=1.5, presence_penalty=1.0)
    assert len({tuple(answer) for answer in result["several"]}) == 3
    assert len(result["regex"]) == 3
    assert set(result["regex"]) <= set("xyz")
