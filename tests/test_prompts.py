"""Ids at every door of a model: none wraps, and what a model cannot take is refused before anything runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from jx_neuron import (
    HuggingFaceGenerationModelAdapter,
    InputError,
    NeuronAutoModelForCausalLM,
    NeuronConfig,
)
from jx_neuron.engine.prompts import restore_as
from jx_neuron.integrations.hf_generate import CACHE, DeviceCache

CAPACITY = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def model(folder: Path) -> NeuronAutoModelForCausalLM:
    every = NeuronConfig(output_all_logits=True)
    return NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=2, n_positions=CAPACITY, context_length_estimate=16, neuron_config=every
    )


@pytest.fixture(scope="module")
def adapter(model: NeuronAutoModelForCausalLM) -> HuggingFaceGenerationModelAdapter:
    return HuggingFaceGenerationModelAdapter(tiny.CONFIGS["gpt2"](), model)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> NeuronAutoModelForCausalLM:
    """A vocabulary that no 16 bits hold."""
    path = tmp_path_factory.mktemp("large")
    config = transformers.GPT2Config(**tiny.GPT2 | {"n_embd": 4, "n_head": 1, "n_layer": 1, "vocab_size": 70_000})
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return NeuronAutoModelForCausalLM.from_pretrained(path, n_positions=16)


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        *((np.array([[1, 2]], narrow), np.int32) for narrow in (np.int8, np.uint8, np.int16, np.uint16, ">i2")),
        *((np.array([[1, 2]], wide), wide) for wide in (np.int32, np.uint32, np.int64, np.uint64, ">i4", object)),
        *((jnp.array([[1, 2]], narrow), jnp.int32) for narrow in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16)),
        *((jnp.array([[1, 2]], wide), wide) for wide in (jnp.int32, jnp.uint32)),
        *(
            (torch.tensor([[1, 2]], dtype=narrow), torch.int64)
            for narrow in (torch.int8, torch.uint8, torch.int16, torch.uint16)
        ),
        *((torch.tensor([[1, 2]], dtype=wide), wide) for wide in (torch.int32, torch.int64)),
    ],
    ids=lambda value: f"{type(value).__module__} {getattr(value, 'dtype', value)}",
)
def test_ids_of_an_answer_do_not_wrap(large: NeuronAutoModelForCausalLM, ids: Any, dtype: Any) -> None:
    out = large.sample(ids, 5, top_k=1, logit_bias={50_000: 1e6})
    assert out.tolist() == [[1, 2, 50_000, 50_000, 50_000]]
    assert out.dtype == dtype
    assert type(out) is type(ids)


def test_a_type_that_holds_the_vocabulary_is_kept(model: NeuronAutoModelForCausalLM) -> None:
    for ids in (np.array([[1, 2]], np.int8), torch.tensor([[1, 2]], dtype=torch.uint8), jnp.array([[1, 2]], jnp.int16)):
        assert model.sample(ids, 9, top_k=1).dtype == ids.dtype
    for vocabulary, dtype in ((128, np.int8), (129, np.int32)):
        assert restore_as(np.array([[1]], np.int8), vocabulary)(np.array([[vocabulary - 1]])).dtype == dtype


def test_lists_of_arrays_are_prompts_too(model: NeuronAutoModelForCausalLM) -> None:
    expected = model.sample([[1, 2], [3, 4]], 9, top_k=1)
    for kind in (np.array, jnp.array, torch.tensor):
        assert model.sample([kind([1, 2]), kind([3, 4])], 9, top_k=1) == expected


NO_IDS = {
    "an id below": ([[1, -1]], r"holds id -1 at .*1\]; ids of this vocabulary are 0 to 100"),
    "an id above": ([[1, 2, 101]], r"holds id 101 at .*2\]"),
    "an id that wraps to one in 32 bits": ([[1, 2**32 + 5]], r"holds id 4294967301 at"),
    "an id that wraps to one in 64 bits": ([[1, 2**64 + 5]], r"holds id 18446744073709551621 at"),
    "ids beyond 64 bits and below 0": ([[2**63, -1]], r"holds id 9223372036854775808 at"),
    "an unsigned id": (np.array([[1, 2**64 - 1]], np.uint64), r"holds id 18446744073709551615 at"),
    "floats": ([[1.0, 2.0]], "must be integers; these are float"),
    "NaN": ([[1, math.nan]], "must be integers; these are float"),
    "flags": (np.array([[True, False]]), "must be integers; these are bool"),
    "texts": ([["a", "b"]], "must be integers; these are str; model.tokenizer makes ids"),
    "a text": ("Hello", "must be integers; these are str; model.tokenizer makes ids"),
    "nothing": (None, "must be integers; these are NoneType"),
    "objects": (np.array([[1, None]]), "must be integers; these are NoneType"),
    "a tokenizer's result": (transformers.BatchEncoding({"input_ids": [[1, 2]]}), r"BatchEncoding; give its \['input_"),
    "no data": (torch.empty((1, 2), dtype=torch.int64, device="meta"), "an array cannot be read"),
    "rows without data": ([torch.empty(2, dtype=torch.int64, device="meta")], "cannot be read"),
    "no tokens": ([[]], "at least one|no tokens"),
    "no rows": ([], "at least one|no tokens"),
    "three axes": (np.ones((1, 1, 2), int), r"\[1, 1, 2\]"),
    "bfloat16": (torch.ones((1, 2), dtype=torch.bfloat16), "must be integers; these are float"),
}
TOO_MUCH = {
    "rows": (np.ones((3, 2), int), "3 rows and the model was made for at most 2|must be one row"),
    "tokens": (np.ones((1, CAPACITY + 1), int), "the prompt has 65 tokens"),
    "different lengths": ([[1, 2], [1]], "different lengths"),
}
DOORS: dict[str, Callable[[NeuronAutoModelForCausalLM, Any], Any]] = {
    "sample": lambda model, ids: model.sample(ids),
    "stream": lambda model, ids: list(model.stream(ids)),
    "logits": lambda model, ids: model(ids),
    "logits, going on": lambda model, ids: model(ids, cache_ids=0),
    "keep_prefix": lambda model, ids: model.keep_prefix([ids] if ids is None else ids),
    "log_likelihoods": lambda model, ids: model.log_likelihoods([ids]),
}


@pytest.mark.few(40)
@pytest.mark.parametrize(
    ("door", "bad"),
    [
        (door, bad)
        for door in DOORS
        for bad in (*NO_IDS, *TOO_MUCH)
        if (door, bad) not in {("log_likelihoods", "tokens"), ("log_likelihoods", "a text")}  # which it scores
    ],
)
def test_what_are_no_ids_is_refused_at_every_door(folder: Path, door: str, bad: str) -> None:
    every = NeuronConfig(output_all_logits=True)
    untouched = NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=2, n_positions=CAPACITY, neuron_config=every
    )
    ids, message = (NO_IDS | TOO_MUCH)[bad]
    with pytest.raises(InputError, match=message):
        DOORS[door](untouched, ids)
    assert not untouched._engine.is_set


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1]]), r"holds id -1 at \[0, 1\]"),
        (torch.tensor([[1, 101]]), r"holds id 101 at \[0, 1\]"),
        (torch.tensor([[1, 2**32 + 5]]), "holds id 4294967301"),
        (torch.tensor([[1.0, 2.0]]), "must be integers; these are float"),
        (torch.tensor([[True]]), "must be integers; these are bool"),
        (torch.ones((1, 2), dtype=torch.bfloat16), "must be integers; these are float"),
        (torch.zeros((1, 0), dtype=torch.long), r"at least one of each; this is \[1, 0\]"),
        (torch.zeros((0, 4), dtype=torch.long), r"at least one of each; this is \[0\]"),
        (torch.tensor([1, 2]), r"must be \[batch, tokens\] .* this is \[2\]"),
        (torch.ones((3, 2), dtype=torch.long), "3 rows and the model was made for at most 2"),
        (torch.ones((1, 65), dtype=torch.long), "the prompt has 65 tokens"),
        (np.array([[1, 2]]), "takes a torch tensor .* ndarray"),
        ([[1, 2]], "takes a torch tensor .* list"),
        ("Hello", "takes a torch tensor .* str"),
    ],
    ids=repr,
)
def test_what_are_no_ids_is_refused_by_the_adapter(
    adapter: HuggingFaceGenerationModelAdapter, ids: Any, message: str
) -> None:
    earlier = adapter(torch.tensor([[1, 2]]))[CACHE]
    for call in (
        lambda: adapter.generate(ids, max_new_tokens=3, pad_token_id=0),
        lambda: adapter.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0, num_beams=2),
        lambda: adapter(ids),
        lambda: adapter(ids, **{CACHE: earlier}),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert earlier.width == 2
    goes_on = adapter(torch.tensor([[3]]), **{CACHE: earlier}).logits
    np.testing.assert_allclose(goes_on[:, -1], adapter(torch.tensor([[1, 2, 3]])).logits[:, -1], atol=1e-4)


def test_what_does_not_go_on_from_a_cache_is_refused(
    adapter: HuggingFaceGenerationModelAdapter, model: NeuronAutoModelForCausalLM
) -> None:
    ids = torch.tensor(tiny.prompts(2, 9))
    mask = torch.ones((2, 9), dtype=torch.long)
    mask[0, :4] = 0
    cache = adapter(ids[:, :8], attention_mask=mask[:, :8])[CACHE]
    longer = torch.cat([mask[:, :8], torch.ones((2, 1))], dim=1)
    for options, message in (
        (dict(input_ids=ids[:1, 8:]), "1 rows and the cache 2"),
        (dict(input_ids=ids[:, 8:]), "row 0"),
        (dict(input_ids=ids[:, 8:], attention_mask=mask[:, 8:]), r"\[2, 1\] must be \[2, 9\]"),
        (dict(input_ids=ids[:, 8:], attention_mask=longer * torch.tensor([[1] * 8 + [0]])), "4 real tokens in row 0"),
        (dict(input_ids=ids[:, 8:], attention_mask=longer * 0.5), r"holds 0\.5"),
        (dict(input_ids=ids[:, 8:], attention_mask=longer, position_ids=torch.tensor([[8], [8]])), "position_ids"),
        (dict(input_ids=ids[:, 8:], attention_mask=longer, logits_to_keep=-1), "logits_to_keep=-1"),
        (dict(input_ids=torch.ones((2, 57), dtype=torch.long), attention_mask=None), "real tokens"),
        (dict(input_ids=ids[:, 8:], inputs_embeds=torch.ones((2, 1, 48))), "inputs_embeds"),
        (dict(), "torch tensor"),
    ):
        with pytest.raises(InputError, match=message):
            adapter(**options, **{CACHE: cache})
    full = adapter(torch.ones((1, CAPACITY), dtype=torch.long))[CACHE]
    with pytest.raises(InputError, match="65 positions"):
        adapter(ids[:1, :1], **{CACHE: full})
    with pytest.raises(InputError, match="is a DynamicCache"):
        adapter(ids, **{CACHE: transformers.DynamicCache()})
    with pytest.raises(InputError, match="inputs_embeds"):
        adapter.generate(inputs_embeds=torch.ones((1, 2, 48)), max_new_tokens=3)
    with pytest.raises(InputError, match="holds nothing yet"):
        DeviceCache().reorder_cache(torch.tensor([0]))
    for index in ([0, 2], [0], [-1, 0], [0.0, 1.0]):
        with pytest.raises(InputError, match="beam_idx"):
            cache.reorder_cache(torch.tensor(index))
    with pytest.raises(InputError, match="tokens_to_remove=-9"):
        cache.crop(-9)
    goes_on = adapter(ids[:, 8:], attention_mask=longer, **{CACHE: cache}).logits
    np.testing.assert_allclose(goes_on[:, -1], adapter(ids, attention_mask=longer).logits[:, -1], atol=1e-4)


ROWS = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((dict(start_ids=value), "start_ids") for value in ([0], [0, 3], [-1, 0], [0.0, 1.0], [math.nan, 0], 1.5)),
        *((dict(start_ids=value), "start_ids") for value in ("01", [[0], [1]], [0, 1, 2], [None, 0], [2**64, 0], [])),
        *((dict(attention_mask=mask), r"attention_mask \[") for mask in ([1, 1, 1], [[1, 1]] * 2, 1, [[[1] * 3]] * 2)),
        (dict(attention_mask=[[1, 1, 1], [1, 1]]), "attention_mask has rows of different lengths"),
        (dict(attention_mask=[[1, 1, 1], [0, 0, 0]]), "row 1 of attention_mask has no real token"),
        (dict(attention_mask=[[1, 1, 1], [0, 0.5, 1]]), r"holds 0\.5"),
        (dict(attention_mask=[[1, 1, 1], [0, math.nan, 1]]), "holds nan"),
        (dict(attention_mask=[[0, 0, 0], [-math.inf, 0, 0]]), "holds -inf"),
        (dict(attention_mask=[[1, 1, 1], [0, 2, 1]]), "holds 2"),
        (dict(attention_mask=[["1"] * 3] * 2), "attention_mask is 1 on real tokens"),
        (dict(attention_mask=[[1] * 3] * 2, start_ids=[0, 0]), "not both"),
        *((dict(sequence_length=value), f"sequence_length={value}") for value in (4.5, 2, 65, 0)),
        *((dict(sequence_length=value), "sequence_length=") for value in ("9", True, math.nan, [9], 10**5000)),
    ],
)  # fmt: skip
def test_where_rows_begin_and_end_is_checked(model: NeuronAutoModelForCausalLM, options: dict, message: str) -> None:
    for call in (model.sample, model.stream):
        with pytest.raises(InputError, match=message):
            call(ROWS, **options)


def test_where_rows_begin_may_be_said_in_any_type(model: NeuronAutoModelForCausalLM) -> None:
    expected = model.sample(ROWS, 9, [1, 0], top_k=1)
    assert expected != model.sample(ROWS, 9, top_k=1)
    for start_ids in ((1, 0), np.array([1, 0], np.uint8), jnp.array([1, 0]), torch.tensor([1, 0])):
        assert model.sample(ROWS, np.int16(9), start_ids, top_k=1) == expected
    mask = [[0, 1, 1], [1, 1, 1]]
    for kind in (np.array, jnp.array, torch.tensor):
        for dtype in ("int32", "float32", "bool"):
            of_kind = kind(mask, dtype=getattr(torch, dtype) if kind is torch.tensor else dtype)
            assert model.sample(ROWS, torch.tensor(9), attention_mask=of_kind, top_k=1) == expected


@pytest.mark.parametrize(
    "cache_ids",
    [[], [3, 5], [4, 3], [3, 4, 5], [-1], [3.0], 2.5, math.nan, [math.nan], "3", [[3, 4]], [True]],
)
def test_positions_that_do_not_follow_each_other_are_refused(model: NeuronAutoModelForCausalLM, cache_ids: Any) -> None:
    with pytest.raises(InputError, match="cache_ids"):
        model([[1, 2], [3, 4]], cache_ids=cache_ids)


def test_positions_beyond_the_model_are_refused_and_a_stream_goes_on(model: NeuronAutoModelForCausalLM) -> None:
    expected = [step.tokens.tolist() for step in model.stream(ROWS, 9, top_k=1)]
    steps = model.stream(ROWS, 9, top_k=1)
    begun = [next(steps).tokens.tolist()]
    for position in (63, 64, 2**31, 2**64):
        with pytest.raises(InputError, match="n_positions=64"):
            model([[1, 2], [3, 4]], cache_ids=position)
    with pytest.raises(InputError, match="start_ids=4"):
        model([[1], [3]], cache_ids=3, start_ids=[4, 0])
    assert begun + [step.tokens.tolist() for step in steps] == expected


def test_padded_rows_go_on_token_by_token(model: NeuronAutoModelForCausalLM) -> None:
    ids, start_ids = tiny.prompts(2, 9), [4, 0]
    whole = model(ids, start_ids=start_ids)
    model(ids[:, :6], start_ids=start_ids)
    for position in range(6, 9):
        for at in (position, [position], np.array([position]), torch.tensor(position)):
            logits = model(ids[:, position : position + 1], cache_ids=at, start_ids=start_ids)
    np.testing.assert_allclose(logits[1, 0], whole[1, 8], atol=1e-4)
    np.testing.assert_allclose(logits[0, 0], whole[0, 4], atol=1e-4)


def test_rows_are_scored_in_any_type(model: NeuronAutoModelForCausalLM) -> None:
    (expected,) = model.log_likelihoods([np.array([1, 2, 3])])
    for row in ([1, 2, 3], [[1, 2, 3]], np.array([1, 2, 3], np.uint8), jnp.array([1, 2, 3]), torch.tensor([1, 2, 3])):
        (parts,) = model.log_likelihoods([row], stride=np.int64(7))
        np.testing.assert_array_equal(parts.logprobs, expected.logprobs)
    for stride in (2.0, True, "7", 65):
        with pytest.raises(InputError, match=f"stride={stride!r}"):
            model.log_likelihoods([[1, 2]], stride=stride)
    with pytest.raises(InputError, match=r"row 1 holds id 101 at \[0\]"):
        model.log_likelihoods([[1, 2], [101]])
