"""sample() and stream() of models made in other ways: with generation configs, batch sizes, and prefixes kept."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import sampled
import tiny
import transformers
from sampled import BUCKETS, LENGTH, SAMPLED, WIDTH, of_hf

from jx_neuron import (
    GenerationConfig,
    GPT2ForSampling,
    GPT2ForSamplingWithContextBroadcasting,
    InputError,
    NeuronAutoModelForCausalLM,
    NeuronConfig,
)
from jx_neuron.errors import ConfigError

hf, folder, ids = sampled.hf, sampled.folder, sampled.ids


@pytest.mark.parametrize("backend", ["xla", "host"])
def test_streams_may_take_turns(folder, ids, backend) -> None:
    model = GPT2ForSampling.from_pretrained(folder, batch_size=2, **BUCKETS, backend=backend)
    expected = model.sample(ids, LENGTH, **SAMPLED)[:, WIDTH:].T
    streams: list[Iterator] = [model.stream(ids, LENGTH, **SAMPLED) for _ in range(2)]
    turns = [[next(stream).tokens for stream in streams] for _ in range(LENGTH - WIDTH)]
    for found in zip(*turns, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_generation_configs(folder, hf, ids) -> None:
    def made(**options: object) -> GPT2ForSampling:
        config = NeuronConfig(on_device_generation=GenerationConfig(**options))
        return GPT2ForSampling.from_pretrained(folder, batch_size=2, **BUCKETS, neuron_config=config)

    greedy = of_hf(hf, ids)
    dynamic = made(max_length=LENGTH, dynamic=True, eos_token_id=int(greedy[0, 14]))
    expected = of_hf(hf, ids, eos_token_id=int(greedy[0, 14]), pad_token_id=int(greedy[0, 14]))
    np.testing.assert_array_equal(dynamic.sample(ids), expected)
    lines = GenerationConfig(
        do_sample=True, per_batch_line=True, top_k=[1, 20], top_p=[1.0, 0.9], temperature=[1.0, 1.3]
    )
    dynamic.update_generation_config(lines)
    told = dynamic.sample(ids, LENGTH, top_k=[1, 20], top_p=[1.0, 0.9], temperature=[1.0, 1.3], seed=2)
    np.testing.assert_array_equal(dynamic.sample(ids, LENGTH, seed=2), told)
    np.testing.assert_array_equal(told[0], greedy[0])
    with pytest.raises(ConfigError, match="not dynamic"):
        made().update_generation_config(lines)
    with pytest.raises(ConfigError, match="per_batch_line"):
        GenerationConfig(top_k=[1, 20])
    with pytest.raises(ConfigError, match=r"takes a jx_neuron\.GenerationConfig"):
        made(dynamic=True).update_generation_config(transformers.GenerationConfig())
    for ids_of_ends in (101, [7, 101]):
        with pytest.raises(ConfigError, match=r"eos_token_id=101 .* from -1 to 100"):
            made(eos_token_id=ids_of_ends)
        with pytest.raises(ConfigError, match=r"eos_token_id=101 .* from -1 to 100"):
            made(dynamic=True).update_generation_config(GenerationConfig(dynamic=True, eos_token_id=ids_of_ends))
    assert made(eos_token_id=-1).eos_token_ids == ()
    steady = made(do_sample=True, deterministic=True, top_k=20)
    first = steady.sample(ids, LENGTH)
    np.testing.assert_array_equal(first, steady.sample(ids, LENGTH, seed=1))
    assert not np.array_equal(first, greedy)
    least = made(do_sample=True, top_p=0.01, top_p_min_tokens=3)
    np.testing.assert_array_equal(least.sample(ids, LENGTH, top_p_min_tokens=1), greedy)
    assert not np.array_equal(least.sample(ids, LENGTH, seed=1), greedy)


def test_a_config_is_assigned_to_and_handed_over_anew(folder, ids) -> None:
    """As code for transformers-neuronx does. Until then the model keeps what it was made with."""
    config = GenerationConfig(do_sample=True, dynamic=True, deterministic=True, top_k=20)
    neuron_config = NeuronConfig(on_device_generation=config)
    models = [
        GPT2ForSampling.from_pretrained(folder, batch_size=2, **BUCKETS, neuron_config=neuron_config) for _ in range(2)
    ]
    drawn = models[0].sample(ids, LENGTH)
    config.top_k = np.int32(1)
    for model in models:
        np.testing.assert_array_equal(model.sample(ids, LENGTH), drawn)
    models[0].update_generation_config(config)
    greedy = models[0].sample(ids, LENGTH)
    np.testing.assert_array_equal(greedy, models[1].sample(ids, LENGTH, top_k=1))
    np.testing.assert_array_equal(models[1].sample(ids, LENGTH), drawn)
    config.max_length = WIDTH + 1
    np.testing.assert_array_equal(models[0].sample(ids, LENGTH), greedy)
    assert not np.array_equal(greedy, drawn)


def test_ended_rows_go_on_in_a_token_of_the_vocabulary(hf, ids, tmp_path) -> None:
    """Conversions of LLaMA-1 have pad_token_id -1, and others an id that was never given a row."""
    free = of_hf(hf, ids)[:, WIDTH:]
    end = next(int(token) for token in free[0] if token not in free[1])
    expected = of_hf(hf, ids, eos_token_id=end, pad_token_id=end)
    hf.save_pretrained(tmp_path)
    for pad in (-1, tiny.VOCAB):
        settings = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": pad}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        model = GPT2ForSampling.from_pretrained(tmp_path, batch_size=2, **BUCKETS)
        found = model.sample(ids.astype(np.uint8), LENGTH, top_k=1, eos_token_override=end)
        np.testing.assert_array_equal(found, expected)
    assert (expected == end).sum() > 2


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["xla", "host"])
def test_batches_smaller_than_compiled_and_batch_buckets(folder, hf, backend) -> None:
    ids = tiny.prompts(5, WIDTH)
    model = GPT2ForSampling.from_pretrained(
        folder, batch_size=[4, 1], n_positions=32, context_length_estimate=16, backend=backend
    )
    assert model.batch_size == 4
    ran: list[int] = []
    run = model.runtime.run
    model.runtime.run = lambda step: ran.append(step.key.rows) or run(step)
    expected = of_hf(hf, ids)
    for rows, compiled in ((1, 1), (2, 4), (3, 4), (4, 4), (1, 1)):
        np.testing.assert_array_equal(model.sample(ids[:rows], LENGTH, top_k=1), expected[:rows])
        assert set(ran) == {compiled}
        ran.clear()
    with pytest.raises(InputError, match=r"5 rows .* at most 4"):
        model.sample(ids, LENGTH)
    np.testing.assert_allclose(model(ids[:3]), tiny.logits(hf, ids[:3])[:, -1], atol=1e-4)
    next_ids = expected[:3, [WIDTH]]
    after = tiny.logits(hf, expected[:3, : WIDTH + 1])[:, -1]
    np.testing.assert_allclose(model(next_ids, cache_ids=[WIDTH]), after, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "xla"),
        pytest.param("llama", "host", marks=pytest.mark.slow),
        *(pytest.param(name, "xla", marks=pytest.mark.slow) for name in ("gpt2", "opt", "gptj")),
    ],
)
def test_one_prompt_many_answers(name, backend, tmp_path) -> None:
    tiny.saved(name, tmp_path)
    ids = tiny.prompts(2, 20)
    shape = dict(n_positions=48, context_length_estimate=16, backend=backend)  # in two chunks
    cls = GPT2ForSamplingWithContextBroadcasting if name == "gpt2" else NeuronAutoModelForCausalLM
    many = cls.from_pretrained(tmp_path, batch_size=6, prompt_batch_size=2, **shape)
    each = NeuronAutoModelForCausalLM.from_pretrained(tmp_path, batch_size=6, **shape)
    prompts: list[int] = []
    run = many.runtime.run
    many.runtime.run = lambda step: (prompts.append(step.key.rows) if step.key.tokens > 1 else None) or run(step)
    asked = [(2, SAMPLED), (2, dict(top_k=1)), (1, SAMPLED | dict(repetition_penalty=1.3))]
    for rows, options in asked if name == "gpt2" else asked[:1]:
        found = many.sample(ids[:rows], 40, start_ids=[3, 0][:rows], **options)
        repeated = np.repeat(ids[:rows], 3, axis=0)
        expected = each.sample(repeated, 40, start_ids=np.repeat([3, 0][:rows], 3), **options)
        np.testing.assert_array_equal(found, expected)
    assert set(prompts) == {2}
    with pytest.raises(InputError, match="prompt_batch_size=4"):
        cls.from_pretrained(tmp_path, batch_size=6, prompt_batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "host"])
def test_a_kept_prefix_is_computed_once_and_changes_nothing(folder, backend) -> None:
    model = GPT2ForSampling.from_pretrained(
        folder, batch_size=2, n_positions=[48, 64], context_length_estimate=[4, 8], backend=backend
    )
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, tiny.VOCAB, 21)
    rest = rng.integers(0, tiny.VOCAB, (2, 6))
    ids = np.hstack([np.repeat(prefix[None], 2, axis=0), rest])
    ragged = dict(attention_mask=np.ones((2, 27), int))
    ragged["attention_mask"][1, 24:] = 0
    other = rng.integers(0, tiny.VOCAB, (2, 27))
    ran: list[int] = []
    run = model.runtime.run
    model.runtime.run = lambda step: ran.append(step.key.tokens) or run(step)

    def answers() -> list[np.ndarray]:
        ran.clear()
        found = [model.sample(ids, 45, **SAMPLED)]
        spent = sum(t for t in ran if t > 1)
        for given, options in ((ids, ragged), (ids[:1, :21], {}), (ids[:1, :22], {}), (other, {})):
            found.append(model.sample(given, 45, **SAMPLED, **options))
        return [spent, *found]

    without = answers()
    model.keep_prefix(prefix.tolist())
    kept, again = answers(), answers()
    model.keep_prefix(None)
    assert kept[0] < without[0]
    if backend == "xla":  # others that take every slot have it computed again where the table is compiled
        assert kept[0] == again[0]
    for found in (kept, again, answers()):
        for a, b in zip(found[1:], without[1:], strict=True):
            np.testing.assert_array_equal(a, b)
