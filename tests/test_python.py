"""Python as it is guessed: two lines to an answer, HF's keywords, messages, dtypes, and a useful repr."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

import jx_neuron
from jx_neuron import AutoModelForCausalLM, InputError, SamplingParams
from jx_neuron.checkpoint import demo
from jx_neuron.engine.keywords import SamplingKeywords
from jx_neuron.errors import ConfigError
from jx_neuron.llm import loading
from jx_neuron.nn.dtypes import amp_of

TEMPLATE = "{% for m in messages %}<0>{{ m.role }}: {{ m.content }}{% endfor %}<1>"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer(TEMPLATE))


@pytest.fixture(scope="module")
def model(folder: Path) -> AutoModelForCausalLM:
    return jx_neuron.load(folder, n_positions=64)


def test_two_lines_to_an_answer(model: AutoModelForCausalLM) -> None:
    answer = jx_neuron.generate(model, "hello", max_new_tokens=5)
    assert (answer.ids, answer.finish_reason) == (model.generate("hello", SamplingParams(max_tokens=5)).ids, "length")
    assert print(answer) is None
    assert str(answer) == answer.text
    several = jx_neuron.generate(model, ["hello", "a"], max_tokens=5)
    assert [one.ids for one in several] == [answer.ids, model.generate("a", max_new_tokens=5).ids]
    assert len(jx_neuron.generate(model, [1, 2]).ids) == 64 - 2  # the default of 128 tokens has no room
    assert model.batch_size == 8


def test_messages_go_through_the_chat_template(model: AutoModelForCausalLM) -> None:
    text = "<0>system: Be brief.<0>user: Hi<1>"
    expected = model.generate(model.tokenizer(text)["input_ids"], max_new_tokens=4)
    assert model.generate(MESSAGES, max_new_tokens=4).ids == expected.ids
    first, _ = model.generate([MESSAGES, "hello"], max_new_tokens=4)
    assert first.ids == expected.ids
    events = list(model.generate(MESSAGES, stream=True, max_new_tokens=4))
    assert tuple(event.token for event in events) == expected.ids


@pytest.mark.parametrize(
    ("keywords", "params"),
    [
        slow({"max_new_tokens": 6}, {"max_tokens": 6}),
        slow({"max_new_tokens": 6, "do_sample": True, "seed": 3}, {"max_tokens": 6, "temperature": 1.0, "seed": 3}),
        (
            {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3},
            {"max_tokens": 6, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3},
        ),
        ({"max_tokens": 6, "do_sample": False, "temperature": 1.5}, {"max_tokens": 6, "temperature": 0}),
        slow(
            {"max_tokens": 6, "num_return_sequences": 3, "temperature": 1.5, "seed": 1},
            {"max_tokens": 6, "n": 3, "temperature": 1.5, "seed": 1},
        ),
    ],
)
def test_keywords_are_those_of_hf_and_of_sampling_params(
    keywords: dict[str, Any], params: dict[str, Any], model: AutoModelForCausalLM
) -> None:
    ours, expected = model.generate([5, 6, 7], **keywords), model.generate([5, 6, 7], SamplingParams(**params))
    assert [answer.ids for answer in ours.answers] == [answer.ids for answer in expected.answers]
    replaced = model.generate([5, 6, 7], SamplingParams(max_tokens=2, temperature=9.0, seed=8), **keywords)
    assert len(replaced.answers[0].ids) == 6


def test_stop_ends_an_answer(model: AutoModelForCausalLM) -> None:
    whole = model.generate("hello", max_new_tokens=8)
    assert whole.text
    for keyword in ("stop", "stop_strings"):
        stopped = model.generate("hello", max_new_tokens=8, **{keyword: whole.text[1:3]})
        assert stopped.finish_reason == "stop"
        assert len(stopped.ids) < 8


def test_every_field_of_sampling_params_is_a_keyword() -> None:
    assert {field.name for field in fields(SamplingParams)} <= set(SamplingKeywords.__annotations__)


@pytest.mark.parametrize(
    ("prompts", "keywords", "error", "said"),
    [
        ("a", {"max_length": 5}, TypeError, "no sampling parameter 'max_length'; there are .*max_new_tokens"),
        ("a", {"max_tokens": 5, "max_new_tokens": 5}, TypeError, "max_new_tokens and max_tokens are the same"),
        ("a", {"do_sample": "yes"}, InputError, "do_sample='yes'"),
        ("a", {"max_new_tokens": 0}, InputError, "max_tokens=0"),
        ([{"role": "user"}], {}, InputError, r"prompt 0 is a list of messages, and message 0 is .*\"content\""),
        ([{"role": "user", "content": "a"}, "b"], {}, InputError, "message 1 is 'b'"),
        ({"input_ids": [1]}, {}, InputError, "give its \\['input_ids'\\]"),
    ],
)
def test_refused(prompts: Any, keywords: Any, error: type[Exception], said: str, model: AutoModelForCausalLM) -> None:
    with pytest.raises(error, match=said):
        model.generate(prompts, **keywords)


def test_messages_take_a_template(folder: Path, tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path, tiny.tokenizer())
    with pytest.raises(InputError, match=r"no chat template; give the prompt as text"):
        AutoModelForCausalLM.from_pretrained(tmp_path, n_positions=32).generate(MESSAGES)


@pytest.mark.parametrize(
    ("dtype", "amp"),
    [
        *[(dtype, "bf16") for dtype in ("bfloat16", "bf16", "torch.bfloat16", jnp.bfloat16, torch.bfloat16)],
        *[(dtype, "f16") for dtype in ("float16", np.float16, np.dtype("float16"), torch.half)],
        *[(dtype, "f32") for dtype in ("f32", np.float32, torch.float32, jnp.dtype("float32"))],
    ],
    ids=str,
)
def test_dtypes(dtype: Any, amp: str) -> None:
    assert amp_of(dtype) == amp


def test_dtype_is_amp_under_another_name(folder: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(folder, n_positions=32, dtype="bfloat16").settings.amp == "bf16"
    assert jx_neuron.NeuronAutoModelForCausalLM is AutoModelForCausalLM
    same = AutoModelForCausalLM.from_pretrained(folder, n_positions=32, dtype=torch.float16, amp="f16")
    assert same.settings.amp == "f16"
    with pytest.raises(ConfigError, match="amp='f32' and dtype='bfloat16' differ"):
        AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", amp="f32")
    for wrong in ("int8", np.int32, float, 3, object()):
        with pytest.raises(ConfigError, match=r"dtype=.* is not supported; it may be one of f32"):
            AutoModelForCausalLM.from_pretrained(folder, dtype=wrong)


def test_a_model_says_what_it_is(model: AutoModelForCausalLM) -> None:
    assert "model_type='llama', parameters='0.0497 M', batch_size=8, n_positions=64" in repr(model)


def test_the_demo_is_taken_from_an_installed_wheel(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pip, and without a copy."""
    package = tmp_path / demo.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / demo.MODEL).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "_fetch", lambda path: path.write_bytes(b"fetched"))
    monkeypatch.setattr(demo, "MODEL_SHA256", demo._sha256(package / demo.MODEL))
    assert demo.demo_model(tmp_path / "cache") == package / demo.MODEL
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(demo, "MODEL_SHA256", "0" * 64)  # as of another version
    assert demo.demo_model(tmp_path / "cache").read_bytes() == b"fetched"
    monkeypatch.setattr(loading, "demo_model", lambda: folder)
    assert jx_neuron.load("demo", n_positions=32).settings.model_type == "llama"
