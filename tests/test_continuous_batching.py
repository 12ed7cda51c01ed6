"""Continuous batching by transformers-neuronx's protocol, driven as vLLM's loader drove it, against Hugging Face."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from families import OPTIONS
from test_families import random_model

from jx_neuron import (
    ContinuousBatchingConfig,
    GenerationConfig,
    NeuronAutoModelForCausalLM,
    NeuronConfig,
    SamplingParams,
)
from jx_neuron.errors import ConfigError, InputError

SEQUENCES, POSITIONS = 3, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"))


def made(folder: Path, backend: str = "xla", **options: Any) -> NeuronAutoModelForCausalLM:
    """A model, made as vLLM's loader made it."""
    batching = ContinuousBatchingConfig(batch_size_for_shared_caches=SEQUENCES)
    return NeuronAutoModelForCausalLM.from_pretrained(
        folder,
        tp_degree=1,
        amp="f32",
        neuron_config=NeuronConfig(continuous_batching=batching, **options),
        context_length_estimate=[POSITIONS],
        n_positions=[POSITIONS],
        batch_size=SEQUENCES,
        backend=backend,
    ).to_neuron()


@pytest.fixture(scope="module")
def model(folder: Path) -> NeuronAutoModelForCausalLM:
    return made(folder)


class Driver:
    """A server's side: the tokens of each sequence, and calls of the model as vLLM's model runner made them."""

    def __init__(self, model: NeuronAutoModelForCausalLM, hf: torch.nn.Module):
        self.model, self.hf = model, hf
        self.tokens: dict[int, list[int]] = {}

    def prefill(self, prompts: dict[int, list[int]]) -> torch.Tensor:
        self.tokens |= {number: list(prompt) for number, prompt in prompts.items()}
        width = max(map(len, prompts.values()))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        positions = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts.values()):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            positions[row, : len(prompt)] = torch.arange(len(prompt))
        return self.checked(list(prompts), self.model(ids, cache_ids=positions, start_ids=torch.tensor([*prompts])))

    def decode(self, tokens: dict[int, int]) -> torch.Tensor:
        positions = torch.tensor([[len(self.tokens[number])] for number in tokens])
        for number, token in tokens.items():
            self.tokens[number].append(token)
        ids, numbers = torch.tensor([[token] for token in tokens.values()]), torch.tensor([[n] for n in tokens])
        return self.checked(list(tokens), self.model.forward(ids, positions, numbers))

    def checked(self, numbers: list[int], logits_nv: torch.Tensor) -> torch.Tensor:
        assert logits_nv.dtype == torch.float32
        assert logits_nv.shape == (len(numbers), tiny.VOCAB)
        for number, logits_v in zip(numbers, logits_nv, strict=True):
            expected = tiny.logits(self.hf, np.array([self.tokens[number]]))[0, -1]
            np.testing.assert_allclose(logits_v.numpy(), expected, atol=1e-4, rtol=0)
        return logits_nv


def come_and_go(driver: Driver) -> None:
    random = np.random.default_rng(0)
    for turn in range(24):
        live = [number for number, tokens in driver.tokens.items() if len(tokens) < POSITIONS]
        if turn % 4 == 0:  # into slots that were never used, that have ended, or whose sequence is aborted
            numbers = random.permutation(SEQUENCES)[: random.integers(1, SEQUENCES)].tolist()
            driver.prefill({n: random.integers(0, tiny.VOCAB, random.integers(1, 12)).tolist() for n in numbers})
            continue
        numbers = random.permutation(live)[: random.integers(1, len(live) + 1)].tolist()  # the others stay idle
        if turn % 4 == 3:
            del driver.tokens[numbers[0]][random.integers(len(driver.tokens[numbers[0]])) :]
        driver.decode({number: int(random.integers(tiny.VOCAB)) for number in numbers})


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama", "xla"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gpt2", "xla"), ("llama", "host"), ("gpt2", "host"))
        ),
    ],
)
def test_rows_come_and_go(family: str, backend: str, tmp_path: Path) -> None:
    come_and_go(Driver(made(tiny.saved(family, tmp_path), backend), tiny.model(family)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "host"])
@pytest.mark.parametrize("family", ["lfm2", "mistral"])
def test_rows_come_and_go_where_layers_forget(family: str, backend: str, tmp_path: Path) -> None:
    hf = random_model(family, OPTIONS[family][0])
    hf.save_pretrained(tmp_path)
    come_and_go(Driver(made(tmp_path, backend), hf))


def test_greedy_tokens_are_those_of_generate(model: NeuronAutoModelForCausalLM) -> None:
    hf, random = tiny.model("llama"), np.random.default_rng(1)
    driver = Driver(model, hf)
    prompts = {number: random.integers(0, tiny.VOCAB, 4 + number).tolist() for number in range(SEQUENCES)}
    tokens: dict[int, int] = {}
    for number in (2, 0, 1):  # admitted while others decode
        tokens[number] = int(driver.prefill({number: prompts[number]})[0].argmax())
        for _ in range(2):
            tokens = dict(zip(tokens, driver.decode(tokens).argmax(-1).tolist(), strict=True))
    for number, prompt in prompts.items():
        answer = model.generate(prompt, SamplingParams(max_tokens=8))  # takes a slot meanwhile
        made_here = driver.tokens[number] + [tokens[number]]
        assert made_here == tiny.greedy(hf, np.array([prompt]), len(made_here))[0].tolist()
        assert made_here[len(prompt) :] == list(answer.ids)[: len(made_here) - len(prompt)]
    driver.decode(tokens)


def test_a_sequence_may_go_back(model: NeuronAutoModelForCausalLM) -> None:
    driver = Driver(model, tiny.model("llama"))
    driver.prefill({0: [5, 6, 7, 8], 1: [9, 10]})
    driver.decode({1: 3, 0: 4})
    driver.tokens[0] = [5, 6]
    driver.decode({0: 11, 1: 12})
    driver.tokens[1] = []
    driver.decode({1: 13})  # a prompt of one token


@pytest.mark.parametrize("backend", ["xla", pytest.param("host", marks=pytest.mark.slow)])
def test_several_tokens_of_a_sequence_that_goes_on(folder: Path, backend: str) -> None:
    model, hf = made(folder, backend, output_all_logits=backend == "host"), tiny.model("llama")
    prompts = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    model(prompts, np.arange(4)[None].repeat(2, 0), [2, 0])
    drafts = np.array([[10, 11, 12], [13, 14, 15]])
    logits_ntv = model(drafts, [[2, 3, 4], [4, 5, 6]], [0, 2])
    assert isinstance(logits_ntv, np.ndarray)
    expected_tv = [tiny.logits(hf, np.array([[5, 6, 10, 11, 12]]))[0, 2:]]
    expected_tv += [tiny.logits(hf, np.array([[1, 2, 3, 4, 13, 14, 15]]))[0, 4:]]
    np.testing.assert_allclose(logits_ntv, expected_tv, atol=1e-4, rtol=0)


def test_tokens_are_drawn_with_on_device_generation(folder: Path, model: NeuronAutoModelForCausalLM) -> None:
    prompts = torch.tensor([[3, 4, 5], [6, 7, 0]])
    positions, numbers = torch.tensor([[0, 1, 2], [0, 1, 0]]), torch.tensor([2, 1])
    drawing = made(folder, on_device_generation=GenerationConfig(dynamic=True, do_sample=True))
    lines = dict(per_batch_line=True, dynamic=True, do_sample=True)
    config = GenerationConfig(**lines, top_k=[2, 20, 1], deterministic=True)  # of each sequence
    for step in (None, GenerationConfig(top_k=1, dynamic=True), config):
        if step is not None:
            drawing.update_generation_config(step)
        drawn = drawing(prompts, positions, numbers)
        assert drawn.shape == (2, 1)
        assert drawn.dtype == torch.int64
    greedy = model(prompts, positions, numbers).argmax(-1)
    assert drawn[0] == greedy[0]
    answers = drawing.generate([[6, 7]], SamplingParams(max_tokens=2, top_k=20))[0].ids
    again = drawing(drawn[1:], torch.tensor([[2]]), numbers[1:])
    assert [int(drawn[1]), int(again)] == list(answers)


ONE = dict(input_ids=[[5]], cache_ids=[[0]], start_ids=[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(start_ids=[3]), "start_ids=3 is not legal; it takes an integer from 0 to 2"),
        (dict(start_ids=[0, 1]), "must be 1 different sequences, one for each row"),
        (dict(input_ids=[[5], [6]], cache_ids=[[0], [0]], start_ids=[1, 1]), "must be 2 different sequences"),
        (dict(cache_ids=None), "start_ids name sequences, and take cache_ids [n, t]"),
        (dict(cache_ids=[[0, 1]]), "cache_ids must be [1, 1], as input_ids are"),
        (dict(input_ids=[[5, 6, 7]], cache_ids=[[0, 1, 3]]), "row 0 of cache_ids, [0, 1, 3], must be positions that"),
        (dict(cache_ids=[[32]]), "33 positions were asked for, and the model was made for n_positions=32"),
        (dict(cache_ids=[[7]], start_ids=[1]), "sequence 1 has 2 tokens, and cache_ids go on at position 7; go on"),
    ],
)
def test_a_call_that_names_no_place_is_refused(
    call: dict[str, Any], words: str, model: NeuronAutoModelForCausalLM
) -> None:
    model([[5, 6]], [[0, 1]], [1])
    with pytest.raises(InputError) as raised:
        model(**(ONE | call))
    assert words in str(raised.value)
    assert np.isfinite(model([[7]], [[2]], [1])).all()  # what there was is there


def test_an_answer_takes_no_sequences(model: NeuronAutoModelForCausalLM) -> None:
    with pytest.raises(InputError, match="an answer needs none; give attention_mask"):
        model.sample([[1, 2]], 4, start_ids=[0])
    assert (
        model.sample([[1, 2, 0]], 5, attention_mask=[[1, 1, 0]], top_k=1)[0][3:]
        == (model.sample([[1, 2]], 4, top_k=1)[0][2:])
    )


def test_the_configuration() -> None:
    config = ContinuousBatchingConfig(max_num_seqs=4, max_model_len=64)
    assert config.batch_size_for_shared_caches == 4
    assert config == ContinuousBatchingConfig(
        batch_size_for_shared_caches=4, max_model_len=64, optimized_paged_attention=False, enable_chunked_prefill=False
    )
    config.init_cache_engine(block_size=64, num_blocks=4)
    assert NeuronConfig(continuous_batching=config).padding_side == "right"
    for wrong, words in (
        (dict(max_num_seqs=4, batch_size_for_shared_caches=5), "which means the same; give one of them"),
        (dict(max_num_seqs=0), "max_num_seqs=0 is not legal"),
        (dict(optimized_paged_attention=True), "optimized_paged_attention=True is not supported"),
        (dict(enable_chunked_prefill=True), "block_size=max_model_len, so that a block is a sequence"),
    ):
        with pytest.raises(ConfigError, match=words):
            ContinuousBatchingConfig(**wrong)
    with pytest.raises(TypeError, match="max_sequences"):
        ContinuousBatchingConfig(max_sequences=4)
    with pytest.raises(ConfigError, match="block_size=16 is less than max_model_len=64"):
        config.init_cache_engine(16, 32)
    with pytest.raises(ConfigError, match=r"it is a jx_neuron\.ContinuousBatchingConfig"):
        NeuronConfig(continuous_batching=True)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (dict(max_num_seqs=4), "max_num_seqs=4 exceeds batch_size=3; make the model with batch_size=4"),
        (dict(max_model_len=96), "max_model_len=96 exceeds n_positions=32; make the model with n_positions=96"),
    ],
)
def test_a_model_too_small_for_its_sequences_is_refused(limits: dict[str, int], words: str, folder: Path) -> None:
    config = NeuronConfig(continuous_batching=ContinuousBatchingConfig(**limits))
    with pytest.raises(ConfigError, match=words):
        NeuronAutoModelForCausalLM.from_pretrained(
            folder, batch_size=SEQUENCES, n_positions=POSITIONS, neuron_config=config
        )
