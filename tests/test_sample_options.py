"""sample() and stream(): what each option does, and that the host chooses as the program does."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import tiny
import torch
import transformers
from sampled import BUCKETS, LENGTH, SAMPLED, WIDTH, of_hf

from jx_neuron import GPT2ForSampling, InputError

NAN = float("nan")
hf, folder, ids = sampled.hf, sampled.folder, sampled.ids


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT2ForSampling:
    return GPT2ForSampling.from_pretrained(folder, batch_size=2, **BUCKETS)


def on_host(model: GPT2ForSampling, ids: np.ndarray, **options: object) -> np.ndarray:
    """The answer where asking for log-probabilities has the host choose."""
    return np.stack([step.tokens for step in model.stream(ids, LENGTH, logprobs=0, **options)], axis=1)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [dict(top_k=1), SAMPLED, SAMPLED | dict(top_k=0, seed=[3, 4]), dict(top_k=[1, 7], temperature=[1, 2.0], seed=9)],
    ids=str,
)
def test_the_host_draws_what_the_program_draws(model, ids, options) -> None:
    np.testing.assert_array_equal(on_host(model, ids, **options), model.sample(ids, LENGTH, **options)[:, WIDTH:])


def test_neutral_values_change_nothing(model, ids) -> None:
    neutral = dict(
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, no_repeat_ngram_size=None, logit_bias={},
        min_p=0.0, top_p_min_tokens=1, stop_strings=None, eos_token_override=-1,
    )  # fmt: skip
    np.testing.assert_array_equal(model.sample(ids, LENGTH, **SAMPLED, **neutral), model.sample(ids, LENGTH, **SAMPLED))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(repetition_penalty=1.6), dict(repetition_penalty=1.6)),
        (dict(no_repeat_ngram_size=1), dict(no_repeat_ngram_size=1)),
        (dict(no_repeat_ngram_size=2), dict(no_repeat_ngram_size=2)),
        (dict(logit_bias={6: -4.0, 20: 3.5}), dict(sequence_bias=[[[6], -4.0], [[20], 3.5]])),
        (
            dict(repetition_penalty=1.2, no_repeat_ngram_size=2, logit_bias={16: -1e9}),
            dict(repetition_penalty=1.2, no_repeat_ngram_size=2, suppress_tokens=[16]),
        ),
    ],
)
def test_processors_are_hfs(model, hf, ids, ours, theirs) -> None:
    found = model.sample(ids, LENGTH, top_k=1, **ours)
    np.testing.assert_array_equal(found, of_hf(hf, ids, **theirs))
    assert not np.array_equal(found, of_hf(hf, ids))


def test_penalties_of_what_was_answered(model, hf, ids) -> None:
    """The logits that each token was the largest of, recomputed from HF's."""
    presence, frequency = [0.8, 0.0], [0.3, 1.1]
    found = model.sample(ids, LENGTH, top_k=1, presence_penalty=presence, frequency_penalty=frequency)
    with torch.no_grad():
        logits = hf(torch.tensor(found)).logits.numpy()
    for row, whole in enumerate(found):
        for at in range(WIDTH, LENGTH):
            count = np.bincount(whole[WIDTH:at], minlength=tiny.VOCAB)
            bent = logits[row, at - 1] - presence[row] * (count > 0) - frequency[row] * count
            assert whole[at] == bent.argmax()
    assert not np.array_equal(found, of_hf(hf, ids))


def probabilities(model, ids, draws: int, **options: object) -> np.ndarray:
    """How often the first token is each of the vocabulary."""
    found = [model.sample(ids, WIDTH + 1, seed=[2 * i, 2 * i + 1], **options)[:, -1] for i in range(draws // 2)]
    return np.bincount(np.concatenate(found), minlength=tiny.VOCAB) / draws


def test_min_p_and_top_p_min_tokens_keep_what_hf_keeps(model, hf, ids) -> None:
    ids = np.repeat(ids[:1], 2, axis=0)
    scores = torch.tensor(model(ids)[:1])
    for ours, warper in (
        (dict(min_p=0.2), transformers.MinPLogitsWarper(0.2)),
        (dict(top_p=0.01, top_p_min_tokens=3), transformers.TopPLogitsWarper(0.01, min_tokens_to_keep=3)),
    ):
        expected = warper(None, scores).softmax(-1)[0].numpy()
        assert (expected > 0).sum() > 1
        found = probabilities(model, ids, 400, top_k=0, **ours)
        assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
        assert np.abs(found - expected).max() < 0.1  # four standard deviations of 400 draws


def test_a_seed_a_row_is_that_row_alone(model, ids) -> None:
    both = model.sample(ids, LENGTH, **SAMPLED | dict(seed=[11, 12]))
    for row, seed in enumerate((11, 12)):
        alone = model.sample(ids[row : row + 1], LENGTH, **SAMPLED | dict(seed=seed))
        np.testing.assert_array_equal(alone[0], both[row])


def test_log_probabilities(model, hf, ids) -> None:
    steps = list(model.stream(ids, LENGTH, logprobs=3, repetition_penalty=1.5, **SAMPLED))
    whole = np.hstack([ids, np.stack([step.tokens for step in steps], axis=1)])
    with torch.no_grad():
        logprobs = hf(torch.tensor(whole)).logits.log_softmax(-1).numpy()
    for at, step in enumerate(steps, start=WIDTH - 1):
        np.testing.assert_allclose(step.logprobs, logprobs[[0, 1], at, step.tokens], atol=1e-4)
        np.testing.assert_allclose(step.top_logprobs, -np.sort(-logprobs[:, at])[:, :3], atol=1e-4)
        np.testing.assert_allclose(
            np.take_along_axis(logprobs[:, at], step.top_tokens, 1), step.top_logprobs, atol=1e-4
        )


def test_steps_say_all_there_is_to_say(model, hf, ids) -> None:
    tokenizer = tiny.tokenizer()
    free = of_hf(hf, ids)[:, WIDTH:]
    end = int(free[0, 10])
    assert end not in free[1]
    steps = list(model.stream(ids, LENGTH, top_k=1, eos_token_override=end))
    assert len(steps) == LENGTH - WIDTH
    first = int(np.flatnonzero(free[0] == end)[0])
    for number, step in enumerate(steps):
        last = number == LENGTH - WIDTH - 1
        assert step.finish_reasons == ("stop" if number >= first else None, "length" if last else None)
        assert step.ended.tolist() == [number >= first, last]
        assert step.logprobs is step.top_tokens is step.top_logprobs is None
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    texts = ["".join(step.text[row] for step in steps) for row in range(2)]
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in (free[0, : first + 1], free[1])]
    assert texts == expected


def test_stop_strings(model, hf, ids) -> None:
    free = of_hf(hf, ids)[:, WIDTH:]
    stop = tiny.tokenizer().decode(free[0, 9:12])
    assert stop not in tiny.tokenizer().decode(free[0, :11])
    out = model.sample(ids[:1], LENGTH, top_k=1, stop_strings=["never there", stop])
    np.testing.assert_array_equal(out[0, WIDTH:], free[0, :12])


def test_stopping_criteria_and_several_ends(model, hf, ids) -> None:
    free = of_hf(hf, ids)

    class AtWidth(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            assert np.array_equal(input_ids.numpy(), free[:, : input_ids.shape[1]])
            return torch.full((len(input_ids),), input_ids.shape[1] >= 15)

    out = model.sample(ids, LENGTH, top_k=1, stopping_criteria_list=transformers.StoppingCriteriaList([AtWidth()]))
    np.testing.assert_array_equal(out, free[:, :15])
    ends = [int(free[0, WIDTH + 3]), int(free[1, WIDTH + 3])]
    expected = of_hf(hf, ids, eos_token_id=ends, pad_token_id=ends[0])
    np.testing.assert_array_equal(model.sample(ids, LENGTH, top_k=1, eos_token_override=ends), expected)


def test_hf_streamers(model, hf, ids, capsys) -> None:
    tokenizer = tiny.tokenizer()
    expected = tokenizer.decode(of_hf(hf, ids)[0])
    for given in (ids[:1], ids[:1].tolist(), torch.tensor(ids[:1])):
        model.sample(given, LENGTH, top_k=1, streamer=transformers.TextStreamer(tokenizer))
        assert capsys.readouterr().out == expected + "\n"
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.sample(ids[:1], LENGTH, top_k=1, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(of_hf(hf, ids)[0, WIDTH:])


def test_a_token_is_seen_before_the_second_step_after_it_begins(model, ids, monkeypatch) -> None:
    events: list[str] = []
    run = model.runtime.run
    monkeypatch.setattr(model.runtime, "run", lambda *a: events.append("run") or run(*a))
    for _ in model.stream(ids, LENGTH, top_k=1):
        events.append("seen")
        assert events.count("run") <= events.count("seen") + 1


def test_an_interrupted_stream_leaves_the_model_usable(model, ids, monkeypatch) -> None:
    whole = model.sample(ids, LENGTH, **SAMPLED)

    class Interrupted(transformers.generation.BaseStreamer):
        ended = False

        def put(self, value: np.ndarray) -> None:
            if value.ndim == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            self.ended = True

    streamer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        model.sample(ids, LENGTH, streamer=streamer)
    assert streamer.ended
    np.testing.assert_array_equal(model.sample(ids, LENGTH, **SAMPLED), whole)
    run = model.runtime.run

    def interrupted(*call: object) -> None:
        run(*call)
        raise KeyboardInterrupt

    steps = model.stream(ids, LENGTH, **SAMPLED)
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(model.runtime, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    np.testing.assert_array_equal(model.sample(ids, LENGTH, **SAMPLED), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(min_p=1.5), "min_p=1.5"),
        (dict(top_p_min_tokens=0), "top_p_min_tokens=0"),
        (dict(repetition_penalty=0), "repetition_penalty=0"),
        (dict(presence_penalty=float("inf")), "presence_penalty=inf"),
        (dict(frequency_penalty="a lot"), "frequency_penalty='a lot'"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size=-1"),
        (dict(no_repeat_ngram_size=2.0), r"no_repeat_ngram_size=2\.0"),
        (dict(logit_bias={101: 1.0}), "an id of logit_bias=101 .* from 0 to 100"),
        (dict(logit_bias={7.0: 1.0}), r"logit_bias=7\.0"),
        (dict(logit_bias={True: 1.0}), "logit_bias=True"),
        (dict(logit_bias={"7": 1.0}), "logit_bias='7'"),
        (dict(logit_bias={7: NAN}), r"logit_bias\[7\]=nan is not legal; it takes a finite number, or -inf"),
        (dict(logit_bias={7: None}), r"logit_bias\[7\]=None"),
        (dict(logit_bias={7: float("inf")}), r"logit_bias\[7\]=inf"),
        (dict(logit_bias={7: 1e39}), r"logit_bias\[7\]=1e\+39"),
        (dict(logit_bias={7: "1"}), r"logit_bias\[7\]='1'"),
        (dict(logit_bias=[7]), "logit_bias=.* mapping"),
        (dict(logit_bias=dict.fromkeys(range(tiny.VOCAB), -float("inf"))), "logit_bias bans each of the 101 tokens"),
        (dict(stop_strings=""), "stop_strings"),
        (dict(stop_strings=5), "stop_strings=5"),
        (dict(stop_strings=["a", None]), "stop_strings"),
        (dict(stop_strings=np.array([1, 2])), r"stop_strings=array\(\[1, 2\]\)"),
        (dict(stop_strings=np.array(0)), r"stop_strings=array\(0\)"),
        (dict(top_k=torch.empty(2, device="meta")), "an array cannot be read"),
        (dict(stopping_criteria_list=5), "stopping_criteria_list=5"),
        (dict(stopping_criteria_list=["never"]), "stopping_criteria_list"),
        (dict(seed=[1, 2, 3]), "seed="),
        (dict(seed=1.5), r"seed=1\.5"),
        (dict(seed=True), "seed=True"),
        (dict(seed="1"), "seed='1'"),
        (dict(eos_token_override=2.0), r"eos_token_override=2\.0"),
        (dict(eos_token_override="2"), "eos_token_override='2'"),
        (dict(eos_token_override=[1, NAN]), "eos_token_override=nan"),
        (dict(eos_token_override=[1, 101]), "eos_token_override=101 .* from -1 to 100"),
        (dict(eos_token_override=-2), "eos_token_override=-2"),
        (dict(top_k=2.5), r"top_k=2\.5"),
        (dict(top_k=[1, 2.0]), r"top_k=2\.0"),
        (dict(top_k=True), "top_k=True"),
        (dict(top_k="5"), "top_k='5'"),
        (dict(top_p=NAN), "top_p=nan"),
        (dict(top_p=[0.5, NAN]), "top_p=nan"),
        (dict(top_p=1e-50), "top_p=1e-50"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(temperature=1e39), r"temperature=1e\+39"),
        (dict(temperature="1"), "temperature='1'"),
        (dict(temperature=[1.0, [2.0]]), "temperature="),
        (dict(top_p_min_tokens=1.5), r"top_p_min_tokens=1\.5"),
        (dict(min_p=NAN), "min_p=nan"),
        (dict(repetition_penalty=NAN), "repetition_penalty=nan"),
        (dict(presence_penalty=True), "presence_penalty=True"),
    ],
)
def test_illegal_values_are_refused(model, ids, options, message) -> None:
    for call in (model.sample, model.stream):
        with pytest.raises(InputError, match=message):
            call(ids, LENGTH, **options)


@pytest.mark.parametrize(
    "kind", [np.int64, np.uint8, np.array, jnp.array, torch.tensor], ids=lambda kind: kind.__name__
)
def test_integers_of_every_kind_are_taken(model, ids, kind) -> None:
    plain = dict(top_k=20, seed=5, no_repeat_ngram_size=2, top_p_min_tokens=2, eos_token_override=7)
    found = model.sample(ids, kind(LENGTH), **{name: kind(value) for name, value in plain.items()})
    np.testing.assert_array_equal(found, model.sample(ids, LENGTH, **plain))
    steps = zip(model.stream(ids, LENGTH, logprobs=kind(3)), model.stream(ids, LENGTH, logprobs=3), strict=True)
    assert [step.top_tokens.shape for pair in steps for step in pair] == [(2, 3)] * 2 * (LENGTH - WIDTH)
    if kind not in (np.int64, np.uint8):
        lists = dict(top_k=[20, 3], seed=[5, 6], eos_token_override=[7, 9])
        found = model.sample(ids, LENGTH, **{name: kind(value) for name, value in lists.items()})
        np.testing.assert_array_equal(found, model.sample(ids, LENGTH, **lists))


def test_numbers_beyond_the_vocabulary_or_32_bits_are_all_of_it(model, ids) -> None:
    every = model.sample(ids, LENGTH, top_k=0, seed=5)
    for top_k in (tiny.VOCAB, 2**31, 2**32 + 1, 2**70, [2**33, 2**70]):
        np.testing.assert_array_equal(model.sample(ids, LENGTH, top_k=top_k, seed=5), every)
    greedy = model.sample(ids, LENGTH, top_k=1)
    for temperature in (0, 1e-40, 1e-50):
        np.testing.assert_array_equal(model.sample(ids, LENGTH, temperature=temperature), greedy)
    for extreme in (
        dict(repetition_penalty=1e-37),
        dict(presence_penalty=-3e38, frequency_penalty=-3e38),
        dict(seed=2**200),
    ):
        tokens = model.sample(ids, LENGTH, top_k=20, **extreme)
        assert ((tokens >= 0) & (tokens < tiny.VOCAB)).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_tokens_may_be_banned(model, hf, ids) -> None:
    """The others keep their distribution."""
    banned = sorted({int(token) for token in of_hf(hf, ids)[:, WIDTH:].ravel()})
    ban = dict.fromkeys(map(np.int64, banned), -np.inf)
    found = model.sample(ids, LENGTH, top_k=1, logit_bias=ban)
    np.testing.assert_array_equal(found, of_hf(hf, ids, suppress_tokens=banned))
    spared = dict.fromkeys((token for token in range(tiny.VOCAB) if token not in (3, 4)), -np.inf)
    for options in (dict(repetition_penalty=1e30, presence_penalty=1e30), dict(top_p=0.1, top_p_min_tokens=50), {}):
        drawn = model.sample(ids, 60, top_k=0, temperature=100.0, seed=1, logit_bias=spared, **options)[:, WIDTH:]
        assert set(drawn.ravel().tolist()) == {3, 4}


def test_an_option_that_does_not_exist_is_named(model, ids) -> None:
    with pytest.raises(TypeError, match=r"no option 'topk'; there are .*top_k"):
        model.sample(ids, LENGTH, topk=1)
    with pytest.raises(InputError, match="logprobs=102"):
        model.stream(ids, LENGTH, logprobs=102)
