"""The transformers-neuronx developer guide's examples, with the import changed, on tiny local checkpoints.

https://awsdocs-neuron.readthedocs-hosted.com/en/latest/libraries/transformers-neuronx/transformers-neuronx-developer-guide.html
"""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from jx_neuron import (
    GQA,
    GenerationConfig,
    GPT2ForSampling,
    GPT2ForSamplingWithContextBroadcasting,
    GPTJForSampling,
    HuggingFaceGenerationModelAdapter,
    LlamaForSampling,
    NeuronAutoModelForCausalLM,
    NeuronConfig,
    OPTForSampling,
)

LENGTH = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in tiny.CONFIGS:
        found[name] = tiny.saved(name, tmp_path_factory.mktemp(name))
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = "<0>"
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def hf(folders: dict[str, Path]) -> dict[str, torch.nn.Module]:
    return {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}


def expected(hf: torch.nn.Module, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
    options = (
        dict(attention_mask=torch.ones_like(input_ids), do_sample=False, max_length=LENGTH, pad_token_id=0) | options
    )
    return hf.generate(input_ids, **options)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("cls", "name"),
    [(GPT2ForSampling, "gpt2"), (OPTForSampling, "opt"), (GPTJForSampling, "gptj"), (LlamaForSampling, "llama")],
)
def test_basic_example(folders, hf, cls, name) -> None:
    neuron_model = cls.from_pretrained(
        folders[name], batch_size=1, tp_degree=2, n_positions=64, amp="f32", context_unroll=None, unroll=None
    )
    neuron_model.to_neuron()
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    prompt = "Hello, I'm a language model,"
    input_ids = tokenizer.encode(prompt, return_tensors="pt")
    with torch.inference_mode():
        generated_sequences = neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=1)
    assert torch.equal(generated_sequences, expected(hf[name], input_ids))
    sampled = neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=50)
    assert len([tokenizer.decode(tok) for tok in sampled]) == 1


def test_hugging_face_generate(folders, hf) -> None:
    batch_size = 2
    neuron_model = GPT2ForSampling.from_pretrained(
        folders["gpt2"], batch_size=batch_size, n_positions=64, tp_degree=2, amp="f32", unroll=None
    )
    neuron_model.to_neuron()
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2"])
    tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = "left"
    encoded_input = tokenizer(["Hello, I'm", "The quick brown"], return_tensors="pt", padding=True)
    config = AutoConfig.from_pretrained(folders["gpt2"])
    model = HuggingFaceGenerationModelAdapter(config, neuron_model)
    options = dict(
        input_ids=encoded_input.input_ids, attention_mask=encoded_input.attention_mask, do_sample=True,
        max_length=LENGTH, temperature=0.7, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.reset_generation()
    torch.manual_seed(0)
    sample_output = model.generate(**options)
    torch.manual_seed(0)
    assert torch.equal(sample_output, hf["gpt2"].generate(**options))


def test_beam_search(folders, hf) -> None:
    num_beams = 4
    neuron_model = GPT2ForSampling.from_pretrained(folders["gpt2"], batch_size=num_beams, n_positions=64)
    model = HuggingFaceGenerationModelAdapter(AutoConfig.from_pretrained(folders["gpt2"]), neuron_model.to_neuron())
    input_ids = torch.tensor(tiny.prompts(1, 8))
    beams = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), num_beams=num_beams, max_length=LENGTH, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(beams, expected(hf["gpt2"], input_ids, num_beams=num_beams))


@pytest.mark.slow
def test_serialization(folders, hf, tmp_path) -> None:
    options = dict(batch_size=1, tp_degree=2, n_positions=64, context_length_estimate=32, amp="f32", backend="host")
    neuron_model = LlamaForSampling.from_pretrained(folders["llama"], **options)
    neuron_model.to_neuron()
    neuron_model.save(tmp_path / "neuron_artifacts")
    neuron_model.save(tmp_path / "presharded", sharded_weights=True)
    del neuron_model
    neuron_model = LlamaForSampling.from_pretrained(folders["llama"], **options)
    neuron_model.load(tmp_path / "neuron_artifacts")
    neuron_model.to_neuron()
    input_ids = torch.tensor(tiny.prompts(1, 8))
    tokens = expected(hf["llama"], input_ids)
    assert torch.equal(neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=1), tokens)
    presharded = LlamaForSampling.from_pretrained(tmp_path / "presharded")
    assert torch.equal(presharded.sample(input_ids, sequence_length=LENGTH, top_k=1), tokens)


def test_grouped_query_attention(folders, hf) -> None:
    neuron_config = NeuronConfig(group_query_attention=GQA.REPLICATED_HEADS)
    neuron_model = LlamaForSampling.from_pretrained(
        folders["llama"], n_positions=64, tp_degree=4, neuron_config=neuron_config
    )
    input_ids = torch.tensor(tiny.prompts(1, 8))
    tokens = neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=1)
    assert torch.equal(tokens, expected(hf["llama"], input_ids))


@pytest.mark.slow
def test_bucketing(folders, hf) -> None:
    neuron_model = NeuronAutoModelForCausalLM.from_pretrained(
        folders["llama"], batch_size=[1, 2], n_positions=[32, 64], context_length_estimate=[8, 16]
    )
    for rows, length in ((1, 5), (2, 12), (2, 25)):
        input_ids = torch.tensor(tiny.prompts(rows, length))
        tokens = neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=1)
        assert torch.equal(tokens, expected(hf["llama"], input_ids))


def test_left_and_right_padding(folders, hf) -> None:
    prompts = ["The first prompt", "Another"]
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.pad_token_id = tokenizer.eos_token_id
    alone = [
        expected(hf["llama"], tokenizer(p, return_tensors="pt").input_ids, max_length=None, max_new_tokens=9)
        for p in prompts
    ]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        tokens = tokenizer(prompts, return_tensors="pt", padding=True)
        input_ids, attention_mask = tokens.input_ids, tokens.attention_mask
        start_ids = (attention_mask == 0).sum(-1)
        neuron_model = LlamaForSampling.from_pretrained(
            folders["llama"], batch_size=2, n_positions=64, neuron_config=NeuronConfig(padding_side=side)
        )
        width = input_ids.shape[1]
        generated = neuron_model.sample(
            input_ids, sequence_length=width + 9, start_ids=start_ids, top_k=1, eos_token_override=-1
        )
        for row, whole in zip(generated, alone, strict=True):
            assert torch.equal(row[width:], whole[0, -9:])


def test_streaming_and_stopping_criteria(folders, hf) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2"])
    neuron_model = GPT2ForSampling.from_pretrained(folders["gpt2"], n_positions=64)
    input_ids = tokenizer.encode("Hello", return_tensors="pt")

    class MaxLength(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> bool:
            return input_ids.shape[1] >= 20

    streamer = TextIteratorStreamer(tokenizer)
    tokens = neuron_model.sample(
        input_ids, sequence_length=LENGTH, top_k=1, streamer=streamer,
        stopping_criteria_list=StoppingCriteriaList([MaxLength()]),
    )  # fmt: skip
    assert torch.equal(tokens, expected(hf["gpt2"], input_ids, max_length=20))
    assert "".join(streamer) == tokenizer.decode(tokens[0])


def test_on_device_sampling(folders, hf) -> None:
    generation_config = GenerationConfig(max_length=LENGTH, do_sample=True, dynamic=True, top_k=1, global_top_k=64)
    neuron_model = LlamaForSampling.from_pretrained(
        folders["llama"], n_positions=64, neuron_config=NeuronConfig(on_device_generation=generation_config)
    )
    input_ids = torch.tensor(tiny.prompts(1, 8))
    assert torch.equal(neuron_model.sample(input_ids, sequence_length=LENGTH), expected(hf["llama"], input_ids))
    neuron_model.update_generation_config(
        GenerationConfig(max_length=LENGTH, do_sample=True, dynamic=True, top_k=32, top_p=0.9, temperature=1.4)
    )
    first, again = (neuron_model.sample(input_ids, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, expected(hf["llama"], input_ids))


def test_all_logits(folders, hf) -> None:
    neuron_model = LlamaForSampling.from_pretrained(
        folders["llama"], n_positions=64, neuron_config=NeuronConfig(output_all_logits=True)
    )
    ids = tiny.prompts(1, 8)
    torch.testing.assert_close(
        torch.tensor(neuron_model(ids)), torch.tensor(tiny.logits(hf["llama"], ids)), atol=1e-4, rtol=0
    )


def test_context_broadcasting(folders, hf) -> None:
    neuron_model = GPT2ForSamplingWithContextBroadcasting.from_pretrained(
        folders["gpt2"], batch_size=4, prompt_batch_size=1, n_positions=64, amp="f32"
    )
    neuron_model.to_neuron()
    input_ids = torch.tensor(tiny.prompts(1, 8))
    greedy = neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=1)
    assert torch.equal(greedy, expected(hf["gpt2"], input_ids).repeat(4, 1))
    sampled = neuron_model.sample(input_ids, sequence_length=LENGTH, top_k=50, seed=0)
    assert len({tuple(row) for row in sampled.tolist()}) == 4
