"""Log-likelihoods and perplexities against HF's."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from jx_neuron import InputError, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.errors import CheckpointError

TEXTS = ["The capital of France is Paris.", "a", "To be, or not to be: that is the question.", "Mind the gap"]
LONG = " ".join(TEXTS * 4)


@pytest.fixture(scope="module")
def hf() -> torch.nn.Module:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"), tiny.tokenizer())


def hf_windows(hf: torch.nn.Module, ids: list[int], longest: int, stride: int) -> list[float]:
    """The loop of https://huggingface.co/docs/transformers/perplexity, token by token."""
    found, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + longest, len(ids))
        window = torch.tensor([ids[begin:end]])
        with torch.no_grad():
            logprobs = hf(window).logits[0].log_softmax(-1)
        target = window[0, 1:]
        of_each = logprobs[torch.arange(len(target)), target].tolist()
        found += of_each[max(0, before - begin - 1) :]
        before = end
        if end == len(ids):
            break
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(batch_size=3, n_positions=64), marks=pytest.mark.slow),
        dict(batch_size=2, n_positions=[32, 48], context_length_estimate=[4, 16]),
        pytest.param(dict(batch_size=1, n_positions=48, context_length_estimate=1), marks=pytest.mark.slow),
        pytest.param(
            dict(batch_size=3, n_positions=64, context_length_estimate=16, tp_degree=2, backend="host"),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(batch_size=4, prompt_batch_size=2, n_positions=64), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scores_are_hfs(hf: torch.nn.Module, folder: Path, options: dict) -> None:
    every = NeuronConfig(output_all_logits=True)
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, neuron_config=every, **options)
    capacity, tokenizer = model.buckets.capacity, tiny.tokenizer()
    for stride in (None, 11):
        scores = model.score([*TEXTS, LONG], stride=stride)
        for text, score in zip([*TEXTS, LONG], scores, strict=True):
            expected = hf_windows(hf, tokenizer(text)["input_ids"], capacity, stride or capacity // 2)
            assert score.tokens == len(expected) == len(text) - 1
            assert score.log_likelihood == pytest.approx(sum(expected), abs=1e-3)
            if expected:
                assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
            else:
                assert math.isnan(score.perplexity)


def test_one_text_may_be_given_alone(folder: Path) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=2, n_positions=64)
    (alone,), together = model.score(TEXTS[0]), model.score(TEXTS)[0]
    assert alone.tokens == together.tokens
    assert alone.log_likelihood == pytest.approx(together.log_likelihood, rel=1e-6)


def test_token_ids_score_as_their_text_does(folder: Path, tmp_path: Path) -> None:
    with_tokenizer = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=64)
    expected = with_tokenizer.score(TEXTS)
    ids = [with_tokenizer.tokenizer(text)["input_ids"] for text in TEXTS]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(folder / file)
    model = NeuronAutoModelForCausalLM.from_pretrained(tmp_path, n_positions=64)
    kinds = (list, tuple, np.array, lambda row: np.array(row, np.uint8), torch.tensor, jnp.array)
    for kind in kinds:
        assert model.score([kind(row) for row in ids]) == expected
        assert model.score(kind(ids[0])) == expected[:1]
        assert model.score(kind([ids[0], ids[0]])) == [expected[0], expected[0]]
    with pytest.raises(InputError, match=r"id 101 at \[1\]; ids of this vocabulary are 0 to 100"):
        model.score([[1, 101]])
    with pytest.raises(InputError, match="must be integers"):
        model.score([[1.5, 2.0]])
    with pytest.raises(InputError, match=r"row 1 has no tokens"):
        model.score([[1], []])
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        model.score("abc")


def test_what_cannot_be_scored_is_refused(folder: Path) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=64)
    with pytest.raises(InputError, match="row 1 has no tokens"):
        model.score(["a", ""])
    for neither in (None, 5, b"abc", {"abc"}, model.tokenizer("abc"), [[[1, 2], [3]]]):
        with pytest.raises(InputError, match=r"^row 0 "):
            model.score(neither)
    for stride in (0, 65):
        with pytest.raises(InputError, match=f"stride={stride}"):
            model.score("abc", stride=stride)
    lowered = NeuronAutoModelForCausalLM.from_pretrained(folder, n_positions=64, backend="host")
    with pytest.raises(InputError, match="output_all_logits=True"):
        lowered.score("abc")
