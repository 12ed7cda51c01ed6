"""Several threads, and several asyncio tasks, on one model: each call gets what it gets alone."""

import asyncio
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from jx_neuron import GPT2ForSampling, InputError, NeuronConfig

CALLERS = 8
LENGTH = 28


@pytest.fixture(scope="module", params=["xla", pytest.param("host", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GPT2ForSampling:
    folder = tiny.saved("gpt2", tmp_path_factory.mktemp("gpt2"), tiny.tokenizer())
    return GPT2ForSampling.from_pretrained(
        folder,
        batch_size=[1, 2],
        n_positions=48,
        context_length_estimate=16,
        backend=request.param,
        neuron_config=NeuronConfig(output_all_logits=True),
    )


def prompt(caller: int) -> np.ndarray:
    rows, width = 1 + caller % 2, 3 + caller * 2
    return np.random.default_rng(caller).integers(0, tiny.VOCAB, (rows, width))


def sample(model: GPT2ForSampling, caller: int) -> np.ndarray:
    return model.sample(prompt(caller), LENGTH, top_k=1)


def drawn(model: GPT2ForSampling, caller: int) -> np.ndarray:
    return model.sample(prompt(caller), LENGTH, top_k=20, temperature=2.0, repetition_penalty=1.2, seed=caller)


def stream(model: GPT2ForSampling, caller: int) -> np.ndarray:
    return np.array([step.tokens for step in model.stream(prompt(caller), LENGTH, top_k=30, seed=caller)])


def continued(model: GPT2ForSampling, caller: int) -> np.ndarray:
    tokens_bt = prompt(caller)
    every = [model(tokens_bt)]
    for _ in range(4):
        next_b1 = every[-1][:, -1:].argmax(-1)
        every.append(model(next_b1, cache_ids=[tokens_bt.shape[1]]))
        tokens_bt = np.hstack([tokens_bt, next_b1])
    return np.concatenate(every, axis=1)


def score(model: GPT2ForSampling, caller: int) -> np.ndarray:
    texts = ["".join(chr(33 + token % 90) for token in row) for row in prompt(caller)]
    return np.array([part.log_likelihood for part in model.score(texts)])


CALLS: list[Callable[[Any, int], np.ndarray]] = [sample, drawn, stream, continued, score]


@pytest.mark.slow
def test_threads_get_their_own_answers(model: GPT2ForSampling) -> None:
    work = [(call, caller) for caller in range(CALLERS) for call in CALLS] * 2
    alone = {(call, caller): call(model, caller) for call, caller in work}
    with ThreadPoolExecutor(CALLERS) as threads:
        answers = list(threads.map(lambda item: item[0](model, item[1]), work))
    for (call, caller), answer in zip(work, answers, strict=True):
        # tokens are the same; logits are rounded as a program of more rows has them
        atol = 1e-5 if answer.dtype.kind == "f" else 0
        np.testing.assert_allclose(
            answer, alone[call, caller], rtol=0, atol=atol, err_msg=f"{call.__name__} of caller {caller}"
        )


@pytest.mark.slow
def test_tasks_get_their_own_answers(model: GPT2ForSampling) -> None:
    async def steps(caller: int) -> np.ndarray:
        tokens = []
        for step in model.stream(prompt(caller), LENGTH, top_k=30, seed=caller):
            tokens.append(step.tokens)
            await asyncio.sleep(0)
        return np.array(tokens)

    async def both() -> list[np.ndarray]:
        in_threads = (asyncio.to_thread(drawn, model, caller) for caller in range(CALLERS))
        return await asyncio.gather(*map(steps, range(CALLERS)), *in_threads)

    alone = [stream(model, caller) for caller in range(CALLERS)] + [drawn(model, caller) for caller in range(CALLERS)]
    for answer, expected in zip(asyncio.run(both()), alone, strict=True):
        np.testing.assert_array_equal(answer, expected)


def test_threads_may_make_the_first_call_together(tmp_path: Path) -> None:
    model = GPT2ForSampling.from_pretrained(tiny.saved("gpt2", tmp_path), batch_size=2, n_positions=48)
    with ThreadPoolExecutor(CALLERS) as threads:
        answers = list(threads.map(lambda _: (model.runtime, sample(model, 1)), range(CALLERS)))
    assert len({runtime for runtime, _ in answers}) == 1
    for _, answer in answers:
        np.testing.assert_array_equal(answer, sample(model, 1))


@pytest.mark.parametrize("listed", [False, True])
def test_a_callback_may_wait_for_another_thread(model: GPT2ForSampling, listed: bool) -> None:
    expected = sample(model, 0)
    with ThreadPoolExecutor(1) as other:

        def criterion(ids: Any, scores: Any) -> bool:
            np.testing.assert_array_equal(other.submit(sample, model, 0).result(timeout=60), expected)
            return False

        criteria = [criterion] if listed else criterion
        answer = model.sample(prompt(0), 8, top_k=1, stopping_criteria_list=criteria)
    np.testing.assert_array_equal(answer, expected[:, :8])


def test_a_call_goes_on_from_its_own_threads_last_alone(model: GPT2ForSampling) -> None:
    model(prompt(0))
    with ThreadPoolExecutor(1) as other, pytest.raises(InputError, match="begin with the whole prompt"):
        other.submit(model, [[1]], cache_ids=[3]).result()
    with pytest.raises(InputError, match=r"left 1 rows of \[3\] tokens"):
        model([[1]], cache_ids=[4])
    with pytest.raises(InputError, match="2 rows cannot go on"):
        model([[1], [2]], cache_ids=[3])
    sample(model, 0)
    with pytest.raises(InputError, match="begin with the whole prompt"):
        model([[1]], cache_ids=[3])


def test_a_model_cannot_be_copied_and_says_what_it_is(model: GPT2ForSampling) -> None:
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            duplicate(model)
    shape = "model_type='gpt2', parameters='0.0661 M', batch_size=2, n_positions=48, tp_degree=1, amp='f32'"
    assert repr(model).startswith("GPT2ForSampling(path=")
    assert repr(model).endswith(f"{shape}, backend={model.backend!r})")
