"""generate(): prompts of any lengths, more than there are slots for, each as if it were alone."""

import numpy as np
import pytest
import tiny

from jx_neuron import Event, InputError, NeuronAutoModelForCausalLM, SamplingParams

PROMPTS = [[5, 6, 7], [8] * 19, [1], [9, 4] * 6, [3, 1, 4, 1, 5], [2] * 30]
DRAWN = SamplingParams(max_tokens=6, temperature=1.5, top_k=20, seed=3)


@pytest.fixture(scope="module", params=["xla", pytest.param("host", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NeuronAutoModelForCausalLM:
    folder = tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer())
    return NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=[1, 2], n_positions=[24, 48], context_length_estimate=[4, 16], backend=request.param
    )


def test_prompts_of_any_lengths_are_answered_as_each_alone(model: NeuronAutoModelForCausalLM) -> None:
    sampling = [DRAWN if n % 2 else SamplingParams(max_tokens=6) for n in range(len(PROMPTS))]
    generations = model.generate(PROMPTS, sampling)
    assert [list(generation.prompt_ids) for generation in generations] == PROMPTS
    for prompt, one, generation in zip(PROMPTS, sampling, generations, strict=True):
        (alone,) = model.generate([prompt], one)
        assert generation.ids == alone.ids
        assert len(generation.ids) == 6
        (answer,) = generation.answers
        assert (answer.finish_reason, answer.logprobs) == ("length", None)
        assert 0 < answer.seconds_to_first <= answer.seconds
        tokens = [prompt, prompt + list(answer.ids)]
        before, after = (model.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens)
        assert answer.text == after[len(before) :]


def test_answers_are_those_of_sample(model: NeuronAutoModelForCausalLM) -> None:
    (greedy,) = model.generate([PROMPTS[0]], SamplingParams(max_tokens=8))
    assert [*PROMPTS[0], *greedy.ids] == model.sample([PROMPTS[0]], 11, top_k=1)[0]
    (drawn,) = model.generate([PROMPTS[0]], DRAWN)
    assert [*PROMPTS[0], *drawn.ids] == model.sample([PROMPTS[0]], 9, temperature=1.5, top_k=20, seed=3)[0]


def test_one_prompt_and_texts_are_taken(model: NeuronAutoModelForCausalLM) -> None:
    ids = model.tokenizer("hello")["input_ids"]
    by_text = model.generate("hello", SamplingParams(max_tokens=3))
    assert by_text.ids == model.generate(ids, SamplingParams(max_tokens=3)).ids
    assert by_text.ids == model.generate(np.array(ids), max_new_tokens=3).ids
    assert [by_text.ids] == [g.ids for g in model.generate(["hello"], max_new_tokens=3)]
    assert str(by_text) == by_text.text == by_text.answers[0].text
    assert by_text.finish_reason == "length"
    assert len(model.generate(["hello", ids])) == 2
    assert model.generate([]) == []


def test_several_answers_are_the_rows_of_a_seed(model: NeuronAutoModelForCausalLM) -> None:
    (several,) = model.generate([PROMPTS[3]], SamplingParams(max_tokens=6, temperature=1.5, top_k=20, seed=3, n=5))
    rows = [model.sample([PROMPTS[3]] * 2, 18, temperature=1.5, top_k=20, seed=3)[n][12:] for n in range(2)]
    assert [list(answer.ids) for answer in several.answers[:2]] == rows
    assert len({answer.ids for answer in several.answers}) == 5


def test_events_tell_every_token_of_every_answer(model: NeuronAutoModelForCausalLM) -> None:
    sampling = [SamplingParams(max_tokens=4, logprobs=2), DRAWN, SamplingParams(max_tokens=5, presence_penalty=0.5)]
    stream = model.generate(PROMPTS[:3], sampling, stream=True)
    events = list(stream)
    assert all(isinstance(event, Event) for event in events)
    whole = model.generate(PROMPTS[:3], sampling)
    for n, generation in enumerate(whole):
        own = [event for event in events if event.prompt == n]
        assert tuple(event.token for event in own) == generation.ids
        assert "".join(event.text or "" for event in own) == generation.text
        assert [event.finish_reason for event in own][:-1] == [None] * (len(own) - 1)
    (scored,) = whole[0].answers
    assert scored.logprobs is not None
    assert scored.top_logprobs is not None
    for token, logprob, top in zip(scored.ids, scored.logprobs, scored.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[0] == (token, logprob)  # greedy


def test_an_end_token_and_a_stop_string_end_their_answer_alone(model: NeuronAutoModelForCausalLM) -> None:
    (first, second) = model.generate(PROMPTS[:2], SamplingParams(max_tokens=8))
    end = first.ids[3]
    stop = second.text[:2] if second.text else ""
    ended, stopped = model.generate(
        PROMPTS[:2], [SamplingParams(max_tokens=8, eos_token_id=end), SamplingParams(max_tokens=8, stop=stop)]
    )
    assert ended.ids == first.ids[: first.ids.index(end) + 1]
    assert ended.answers[0].finish_reason == stopped.answers[0].finish_reason == "stop"
    assert stop in (stopped.text or "")
    assert second.ids[: len(stopped.ids)] == stopped.ids


@pytest.mark.slow
def test_a_row_that_wants_the_host_does_not_take_others_there(model: NeuronAutoModelForCausalLM) -> None:
    mixed = model.generate(PROMPTS[:2], [DRAWN, SamplingParams(max_tokens=6, repetition_penalty=1.4)])
    alone = [
        model.generate([prompt], sampling)[0]
        for prompt, sampling in zip(
            PROMPTS, [DRAWN, SamplingParams(max_tokens=6, repetition_penalty=1.4)], strict=False
        )
    ]
    assert [g.ids for g in mixed] == [g.ids for g in alone]


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[1] * 48], None, "prompt 0 has 48 tokens and leaves no room"),
        ([[1], [101]], None, "prompt 1 holds id 101"),
        ([[1], []], None, "prompt 1 has no tokens"),
        ([[1.5]], None, "prompt 0 must be integers"),
        ([[1]], [SamplingParams()] * 2, "takes a SamplingParams, or 1, one for each prompt"),
        ([[1]], SamplingParams(temperature=-1), "temperature=-1"),
        ([[1]], SamplingParams(max_tokens=0), "max_tokens=0"),
        ([[1]], SamplingParams(n=0), "n=0"),
        ([[1]], SamplingParams(stop=""), "stop_strings"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_anything_runs(model, prompts, sampling, message) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(prompts, sampling, stream=True)
