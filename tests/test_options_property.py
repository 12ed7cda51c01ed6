"""Any options: where legal, the host draws what the program draws; where not, the error names the option."""

import math

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jx_neuron import GenerationConfig, GPT2ForSampling, InputError
from jx_neuron.config import READ
from jx_neuron.errors import ConfigError

ROWS, WIDTH, NEW = 2, 5, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPT2ForSampling:
    folder = tiny.saved("gpt2", tmp_path_factory.mktemp("gpt2"))
    return GPT2ForSampling.from_pretrained(folder, batch_size=ROWS, n_positions=16, context_length_estimate=8)


def a_row(values: st.SearchStrategy) -> st.SearchStrategy:
    rows = st.lists(values, min_size=ROWS, max_size=ROWS)
    return values | rows | rows.map(tuple) | rows.map(np.array)


def numbers(least: float, most: float, **bounds: bool) -> st.SearchStrategy:
    return st.floats(least, most, width=32, **bounds)


LEGAL = st.fixed_dictionaries(
    {"seed": a_row(st.integers(0, 2**63 - 1))},
    optional={
        "top_k": a_row(st.integers(0, 2**31) | st.integers(0, 9)),
        "top_p": a_row(numbers(2**-126, 1)),
        "temperature": a_row(numbers(0, 2**127) | numbers(0, 2) | st.just(1e-40)),
        "eos_token_override": st.integers(-1, tiny.VOCAB - 1),
    },
)
NO_NUMBERS = st.sampled_from([math.nan, math.inf, True, "5", {}, [], [[1] * ROWS] * ROWS, [1] * (ROWS + 1)])
FRACTIONS = st.floats(-9, 9).filter(lambda value: value != 0) | st.integers(-9, 9).map(float)
NEGATIVE = st.integers(max_value=-1)
ILLEGAL = {
    "top_k": FRACTIONS | NEGATIVE,
    "top_p": numbers(-9, 0) | numbers(1, 9, exclude_min=True),
    "top_p_min_tokens": FRACTIONS | st.integers(max_value=0),
    "min_p": numbers(-9, -1) | numbers(1, 9, exclude_min=True),
    "temperature": numbers(-9, -1),
    "seed": FRACTIONS | NEGATIVE,
    "repetition_penalty": numbers(-9, 0),
    "presence_penalty": st.none().map(lambda _: -math.inf),
    "frequency_penalty": st.none().map(lambda _: -math.inf),
    "no_repeat_ngram_size": FRACTIONS | NEGATIVE,
    "logit_bias": st.dictionaries(FRACTIONS | NEGATIVE | st.integers(min_value=tiny.VOCAB), st.just(1.0), min_size=1)
    | st.dictionaries(st.integers(0, tiny.VOCAB - 1), st.sampled_from([math.nan, math.inf, None, "1"]), min_size=1),
    "eos_token_override": FRACTIONS | st.integers(min_value=tiny.VOCAB) | st.integers(max_value=-2),
}
TAKEN = [("logit_bias", {}), ("eos_token_override", [1] * (ROWS + 1))]  # which are no number, and legal
REFUSED = (
    st.sampled_from(sorted(ILLEGAL))
    .flatmap(lambda name: st.tuples(st.just(name), ILLEGAL[name] | NO_NUMBERS))
    .filter(lambda refused: refused not in TAKEN)
)


@given(options=LEGAL)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_the_host_draws_what_the_program_draws(model: GPT2ForSampling, options: dict) -> None:
    ids = tiny.prompts(ROWS, WIDTH)
    in_program = model.sample(ids, WIDTH + NEW, **options)[:, WIDTH:]
    on_host = np.stack([step.tokens for step in model.stream(ids, WIDTH + NEW, logprobs=0, **options)], axis=1)
    np.testing.assert_array_equal(on_host, in_program)
    assert ((in_program >= 0) & (in_program < tiny.VOCAB)).all()


@given(refused=REFUSED)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_what_is_not_legal_is_named(model: GPT2ForSampling, refused: tuple) -> None:
    name, value = refused
    with pytest.raises(InputError, match=name):
        model.sample(tiny.prompts(ROWS, WIDTH), WIDTH + NEW, **{name: value})
    if name in READ:
        with pytest.raises(ConfigError, match=name):
            GenerationConfig(**{name: value})
