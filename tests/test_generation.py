"""sample(), stream() and calling the model, on tiny GPT-2 models, against HF's generate()."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jx_neuron import GPT2ForSampling, InputError, LlamaForSampling, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.errors import ConfigError

VOCAB, POSITIONS = 101, 64


@pytest.fixture(scope="module")
def hf() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=48,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(hf: transformers.GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT2ForSampling:
    return GPT2ForSampling.from_pretrained(folder, batch_size=2)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, 13))


def greedy(hf: transformers.GPT2LMHeadModel, ids: np.ndarray, length: int) -> np.ndarray:
    prompt = torch.tensor(ids)
    mask = torch.ones_like(prompt)  # else HF takes every pad_token_id in the prompt for padding
    return hf.generate(prompt, attention_mask=mask, max_length=length, do_sample=False, pad_token_id=0).numpy()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context_length_estimate": 4},
        {"context_length_estimate": 1},
        {"context_length_estimate": [5, 9], "n_positions": [20, 61]},
        {"n_positions": 60, "tp_degree": 2},
        {"context_length_estimate": 4, "tp_degree": 8},
    ],
    ids=str,
)
def test_greedy_is_hf_for_any_buckets(folder, hf, ids, options) -> None:
    model = GPT2ForSampling.from_pretrained(folder, batch_size=2, **options)
    np.testing.assert_array_equal(model.sample(ids, 60, top_k=1), greedy(hf, ids, 60))


def test_a_seed_gives_a_row_its_tokens_in_any_batch_bucket_and_degree(folder, model, ids) -> None:
    one = model.sample(ids, 50, top_k=20, top_p=0.95, temperature=1.3, seed=7)
    assert not np.array_equal(one, model.sample(ids, 50, top_k=20, top_p=0.95, temperature=1.3, seed=8))
    for options in ({"n_positions": 51, "context_length_estimate": 6}, {"tp_degree": 2}):
        other = GPT2ForSampling.from_pretrained(folder, batch_size=2, **options)
        np.testing.assert_array_equal(one, other.sample(ids, 50, top_k=20, top_p=0.95, temperature=1.3, seed=7))
    three = GPT2ForSampling.from_pretrained(folder, batch_size=3)
    wider = three.sample(np.vstack([ids, ids[:1]]), 50, top_k=20, top_p=0.95, temperature=1.3, seed=7)
    np.testing.assert_array_equal(one, wider[:2])
    assert not np.array_equal(wider[2], wider[0])


def test_rows_may_be_sampled_differently(model, hf, ids) -> None:
    out = model.sample(ids, 40, top_k=[1, 0], temperature=[1.0, 3.0], seed=1)
    np.testing.assert_array_equal(out[0], greedy(hf, ids[:1], 40)[0])
    assert not np.array_equal(out[1], greedy(hf, ids[1:], 40)[0])


def test_padded_rows_are_those_rows_alone(model, hf, ids) -> None:
    expected = [greedy(hf, ids[:1, 4:], 36)[0], greedy(hf, ids[1:], 40)[0]]
    left = model.sample(ids, 40, start_ids=[4, 0], top_k=1)
    np.testing.assert_array_equal(left[0, 4:], expected[0])
    np.testing.assert_array_equal(left[1], expected[1])
    mask = np.ones((2, 13), int)
    mask[0, :4] = 0
    np.testing.assert_array_equal(model.sample(ids, 40, attention_mask=mask, top_k=1), left)
    right = np.array([[*ids[0, 4:], 0, 0, 0, 0], ids[1]])
    out = model.sample(right, 40, attention_mask=mask[:, ::-1], top_k=1)
    np.testing.assert_array_equal(out[0, 13:], expected[0][9:])


@pytest.mark.slow
def test_logits_of_prompts_and_of_what_follows(folder, model, hf, ids) -> None:
    with torch.no_grad():
        expected = hf(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids), expected[:, -1], atol=1e-4)
    model(ids[:, :6])
    np.testing.assert_allclose(model(ids[:, 6:10], cache_ids=[6, 7, 8, 9]), expected[:, 9], atol=1e-4)
    np.testing.assert_allclose(model(ids[:, 10:11], cache_ids=[10]), expected[:, 10], atol=1e-4)
    every = GPT2ForSampling.from_pretrained(
        folder, batch_size=2, context_length_estimate=5, neuron_config=NeuronConfig(output_all_logits=True)
    )
    np.testing.assert_allclose(every(ids), expected, atol=1e-4)


def test_an_end_token_stops_its_row_and_then_the_loop(model, hf, ids) -> None:
    free = greedy(hf, ids, 60)[:, 13:]
    end = int(free[0, 5])
    stops = [int(np.argmax(row == end)) if end in row else None for row in free]
    assert stops[0] is not None
    out = model.sample(ids, 60, top_k=1, eos_token_override=end)[:, 13:]
    for row, whole, stop in zip(out, free, stops, strict=True):
        last = len(out[0]) - 1 if stop is None else stop
        np.testing.assert_array_equal(row[: last + 1], whole[: last + 1])
        assert (row[last + 1 :] == end).all()
    both = [int(free[0, 5]), int(free[1, 3])]
    ended = model.sample(ids, 60, top_k=1, eos_token_override=both)
    assert ended.shape[1] <= 13 + 6


def test_the_answer_is_of_the_kind_that_was_given(model, ids) -> None:
    as_numpy = model.sample(ids, 20, top_k=1)
    assert as_numpy.dtype == ids.dtype
    as_list = model.sample(ids.tolist(), 20, top_k=1)
    assert as_list == as_numpy.tolist()
    as_torch = model.sample(torch.tensor(ids, dtype=torch.int32), 20, top_k=1)
    assert as_torch.dtype == torch.int32
    assert as_torch.tolist() == as_list
    as_jax = model.sample(jnp.asarray(ids), 20, top_k=1)
    assert isinstance(as_jax, jnp.ndarray)
    assert as_jax.tolist() == as_list


def test_a_streamer_gets_the_prompt_then_each_step(model, ids) -> None:
    class Streamer:
        got: list[list[int]] = []  # noqa: RUF012
        ended = False

        def put(self, value: np.ndarray) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = model.sample(ids, 20, top_k=1, streamer=streamer)
    assert streamer.ended
    assert streamer.got[0] == ids.tolist()
    assert np.array(streamer.got[1:]).T.tolist() == out[:, 13:].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample([[1, 2]] * 3, 9), "3 rows and the model was made for at most 2"),
        (lambda m: m.sample([[1, 101]] * 2, 9), "id 101"),
        (lambda m: m.sample([[1, -1]] * 2, 9), "0 to 100"),
        (lambda m: m.sample([[1] * 65] * 2, 65), "n_positions=64"),
        (lambda m: m.sample([[1, 2]] * 2, 65), "sequence_length=65"),
        (lambda m: m.sample([[1, 2]] * 2, 1), "sequence_length=1"),
        (lambda m: m.sample([[1, 2], [1]], 9), "different lengths"),
        (lambda m: m.sample([[], []], 9), "at least one"),
        (lambda m: m.sample([[0.5]] * 2, 9), "integers"),
        (lambda m: m.sample([[1, 2]] * 2, 9, start_ids=[2, 0]), "start_ids"),
        (lambda m: m.sample([[1, 2, 3]] * 2, 9, attention_mask=[[1, 0, 1]] * 2), "gap"),
        (lambda m: m.sample([[1]] * 2, 9, top_p=0.0), "top_p=0.0"),
        (lambda m: m.sample([[1]] * 2, 9, temperature=-1), "temperature=-1"),
        (lambda m: m.sample([[1]] * 2, 9, top_k=[1, 2, 3]), "top_k"),
        (lambda m: m.sample([[1]] * 2, 9, seed=-1), "seed=-1"),
        (lambda m: m([[1, 2]] * 2, cache_ids=[63, 64]), "n_positions=64"),
    ],
)
def test_calls_that_cannot_be_taken_are_refused_before_anything_runs(folder, call, message) -> None:
    untouched = GPT2ForSampling.from_pretrained(folder, batch_size=2)
    with pytest.raises(InputError, match=message):
        call(untouched)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_positions": 65}, "64 positions"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"tp_degree": 0}, "tp_degree=0"),
        ({"amp": "f8"}, "f32, f16, bf16"),
    ],
)
def test_models_that_cannot_be_made_are_refused(folder, options, message) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        GPT2ForSampling.from_pretrained(folder, **options)


def test_a_class_takes_its_own_family(folder) -> None:
    with pytest.raises(ConfigError, match="model_type 'llama'"):
        LlamaForSampling.from_pretrained(folder)
    assert NeuronAutoModelForCausalLM.from_pretrained(folder).settings.model_type == "gpt2"


@pytest.mark.parametrize("amp", ["f16", "bf16"])
def test_reduced_precision_stays_close(folder, hf, ids, amp) -> None:
    model = GPT2ForSampling.from_pretrained(folder, batch_size=2, amp=amp)
    with torch.no_grad():
        expected = hf(torch.tensor(ids)).logits[:, -1].numpy()
    assert np.abs(model(ids) - expected).max() < (0.02 if amp == "f16" else 0.2) * np.abs(expected).max()
