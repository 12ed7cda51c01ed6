"""Generation with the demo model, a real one, against HF: SmolLM2-135M-Instruct in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from jx_neuron import (
    HuggingFaceGenerationModelAdapter,
    NeuronAutoModelForCausalLM,
    NeuronConfig,
    QuantizationConfig,
    SamplingParams,
)
from jx_neuron.checkpoint.demo import demo_model
from jx_neuron.checkpoint.folder import open_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = ["The capital of France is", "Once upon a time, in a village by the sea, there lived"]
NEW = 32


@pytest.fixture(scope="module")
def hf() -> transformers.LlamaForCausalLM:
    checkpoint = open_checkpoint(demo_model())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config)).eval()
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(**checkpoint.generation_config)
    return model


@pytest.fixture(scope="module")
def ours() -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(demo_model(), batch_size=[1, 8], n_positions=[64, 256])


@pytest.fixture(scope="module")
def encoded(ours: NeuronAutoModelForCausalLM) -> dict[str, torch.Tensor]:
    tokenizer = ours.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(num_beams=4, do_sample=False, length_penalty=0.6, early_stopping=True),
        dict(num_beams=4, num_return_sequences=2, do_sample=False, no_repeat_ngram_size=3),
        dict(do_sample=False, repetition_penalty=1.3, stop_strings=[".", " and"]),
        dict(do_sample=True, num_return_sequences=4, temperature=0.8, top_p=0.9),
    ],
    ids=str,
)
def test_generate_is_hfs(hf, ours, encoded, options) -> None:
    options = options | dict(max_new_tokens=NEW, pad_token_id=0, tokenizer=ours.tokenizer)
    found = []
    for model in (hf, HuggingFaceGenerationModelAdapter(hf.config, ours)):
        torch.manual_seed(0)
        found.append(model.generate(**encoded, **options))
    assert torch.equal(*found)


def test_output_scores_are_hfs(hf, ours, encoded) -> None:
    adapter = HuggingFaceGenerationModelAdapter(hf.config, ours)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
    a, b = (model.generate(**encoded, **options) for model in (hf, adapter))
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)


def test_perplexity_of_a_text_file_is_hfs(hf, ours) -> None:
    text = (Path(__file__).parents[1] / "LICENSE").read_text()[:6000]
    ids = torch.tensor([ours.tokenizer(text)["input_ids"]])
    longest, stride = ours.buckets.capacity, 100
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):  # https://huggingface.co/docs/transformers/perplexity
        end = min(begin + longest, ids.shape[1])
        target = ids[:, begin:end].clone()
        target[:, : -(end - before)] = -100
        scored = int((target[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(hf(ids[:, begin:end], labels=target).loss) * scored
        count, before = count + scored, end
        if end == ids.shape[1]:
            break
    (score,) = ours.score(text, stride=stride)
    assert score.tokens == count
    assert score.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)


def greedy_in_int8(**options) -> list[list[int]]:
    quant = NeuronConfig(quant=QuantizationConfig.named("int8"))
    model = NeuronAutoModelForCausalLM.from_pretrained(
        demo_model(), n_positions=64, context_length_estimate=16, neuron_config=quant, **options
    )
    return [list(answer.ids) for answer in model.generate(PROMPTS, SamplingParams(max_tokens=NEW, eos_token_id=-1))]


@pytest.fixture(scope="module")
def tokens_in_int8() -> list[list[int]]:
    return greedy_in_int8(backend="xla")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_lowered_int8_programs_give_the_tokens_of_xla(tokens_in_int8, tp) -> None:
    assert greedy_in_int8(backend="host", tp_degree=tp) == tokens_in_int8
