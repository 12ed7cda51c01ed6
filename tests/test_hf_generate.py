"""HF's generate() over our models, against HF's over its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

from jx_neuron import HuggingFaceGenerationModelAdapter, InputError, NeuronAutoModelForCausalLM
from jx_neuron.integrations.hf_generate import CACHE

ROWS, WIDTH, NEW = 2, 9, 14
BEAMS = dict(num_beams=4, do_sample=False)
STRATEGIES = {
    "greedy": dict(do_sample=False),
    "greedy, no cache": dict(do_sample=False, use_cache=False),
    "beams, length penalty, early stopping": BEAMS
    | dict(length_penalty=0.5, early_stopping=True, eos_token_id=[5, 17, 60]),
    "beams, never stopping early": BEAMS | dict(length_penalty=2.0, early_stopping="never", eos_token_id=[5, 17, 60]),
    "beams, several returned": BEAMS | dict(num_return_sequences=3),
    "beams, sampled": dict(num_beams=3, do_sample=True, top_k=20),
    "sampled, several returned": dict(do_sample=True, num_return_sequences=4, temperature=1.3),
}
PROCESSORS = {
    "bad_words_ids": [[6], [16, 52]],
    "begin_suppress_tokens": [52, 79],
    "encoder_repetition_penalty": 1.4,
    "exponential_decay_length_penalty": (4, 1.2),
    "forced_bos_token_id": 8,
    "forced_eos_token_id": 9,
    "guidance_scale": 1.5,
    "min_length": 15,
    "min_new_tokens": 6,
    "no_repeat_ngram_size": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.7,
    "sequence_bias": [[[4], 2.5], [[6, 8], -3.0]],
    "suppress_tokens": [6, 16],
    "watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"},
}
WITHOUT_EFFECT_HERE = {
    "forced_bos_token_id",
    "min_length",
    "min_new_tokens",
    "remove_invalid_values",
    "renormalize_logits",
}
WARPERS = {
    "epsilon_cutoff": 3e-3,
    "eta_cutoff": 3e-3,
    "min_p": 0.05,
    "temperature": 0.7,
    "top_h": 0.4,
    "top_k": 5,
    "top_p": 0.8,
    "typical_p": 0.6,
}


class Pair:
    """A tiny model, HF's and ours."""

    def __init__(self, name: str, folder: Path, **generation: object):
        self.hf = tiny.model(name)
        self.hf.generation_config = transformers.GenerationConfig(**generation)
        self.hf.save_pretrained(folder)
        self.model = NeuronAutoModelForCausalLM.from_pretrained(folder, batch_size=8, n_positions=[32, 64])
        self.ours = HuggingFaceGenerationModelAdapter(self.hf.config, self.model)

    def generate(self, ids: torch.Tensor, **options: object) -> tuple:
        options = dict(attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=NEW) | options
        found = []
        for model in (self.hf, self.ours):
            torch.manual_seed(7)
            found.append(model.generate(ids, **options))
        return tuple(found)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.tensor(tiny.prompts(ROWS, WIDTH))


@pytest.fixture(scope="module")
def padded() -> torch.Tensor:
    mask = torch.ones((ROWS, WIDTH), dtype=torch.long)
    mask[0, :4] = 0
    return mask


@pytest.mark.few(3)
@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_strategies(pair: Pair, ids: torch.Tensor, padded: torch.Tensor, options: dict) -> None:
    hf, ours = pair.generate(ids, attention_mask=padded, **options)
    assert torch.equal(hf, ours)


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gptj")), "llama"])
def test_families(name: str, tmp_path: Path, ids: torch.Tensor, padded: torch.Tensor) -> None:
    pair = Pair(name, tmp_path)
    for options in (STRATEGIES["greedy"], STRATEGIES["beams, length penalty, early stopping"]):
        hf, ours = pair.generate(ids, attention_mask=padded, **options)
        assert torch.equal(hf, ours)


@pytest.mark.few(5)
@pytest.mark.parametrize("option", PROCESSORS)
def test_logits_processors(pair: Pair, ids: torch.Tensor, option: str) -> None:
    plain, _ = pair.generate(ids, do_sample=False, eos_token_id=9)
    hf, ours = pair.generate(ids, do_sample=False, eos_token_id=9, **{option: PROCESSORS[option]})
    assert torch.equal(hf, ours)
    if option not in WITHOUT_EFFECT_HERE:
        assert not torch.equal(hf, plain)


@pytest.mark.parametrize("option", WARPERS)
def test_warpers(pair: Pair, ids: torch.Tensor, option: str) -> None:
    hf, ours = pair.generate(ids, do_sample=True, **{option: WARPERS[option]})
    assert torch.equal(hf, ours)


def test_every_processor_of_the_config_is_tested() -> None:
    config = transformers.GenerationConfig(**PROCESSORS, **WARPERS, do_sample=True)
    assert config.to_diff_dict().keys() >= (PROCESSORS | WARPERS).keys()


def test_scores_and_logits(pair: Pair, ids: torch.Tensor, padded: torch.Tensor) -> None:
    wanted = dict(output_scores=True, output_logits=True, return_dict_in_generate=True)
    for options in (dict(do_sample=False, repetition_penalty=1.3), BEAMS):
        hf, ours = pair.generate(ids, attention_mask=padded, **wanted, **options)
        assert torch.equal(hf.sequences, ours.sequences)
        assert len(ours.scores) == len(ours.logits) == NEW
        for name in ("scores", "logits"):
            for a, b in zip(getattr(hf, name), getattr(ours, name), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    torch.testing.assert_close(hf.sequences_scores, ours.sequences_scores, atol=1e-4, rtol=0)


def test_stopping(pair: Pair, ids: torch.Tensor) -> None:
    tokenizer = tiny.tokenizer()
    free, _ = pair.generate(ids, do_sample=False)
    stop = tokenizer.decode(free[0, WIDTH + 3 : WIDTH + 5])
    hf, ours = pair.generate(ids[:1], do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(hf, ours)
    assert ours.shape[1] < WIDTH + NEW

    class AtMost(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= WIDTH + 3)

    criteria = transformers.StoppingCriteriaList([AtMost()])
    hf, ours = pair.generate(ids, do_sample=False, stopping_criteria=criteria)
    assert torch.equal(hf, ours)
    assert ours.shape[1] == WIDTH + 3


def test_streamers(pair: Pair, ids: torch.Tensor) -> None:
    class Collect(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.got: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.ended = True

    collect = Collect()
    out = pair.ours.generate(ids[:1], max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=collect)
    assert [token for tokens in collect.got for token in tokens] == out[0].tolist()
    assert len(collect.got) == NEW + 1
    assert collect.ended


def test_calls_leave_nothing_behind(pair: Pair, ids: torch.Tensor) -> None:
    first = pair.ours.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    pair.ours.generate(ids[:1, :5], max_new_tokens=3, num_beams=3, do_sample=False, pad_token_id=0)
    pair.ours.reset_generation()
    assert torch.equal(first, pair.ours.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0))


def test_the_checkpoints_generation_config_is_the_default(tmp_path: Path, ids: torch.Tensor) -> None:
    pair = Pair("llama", tmp_path, max_new_tokens=5, num_beams=2, repetition_penalty=1.3, pad_token_id=0)
    mask = torch.ones_like(ids)
    assert torch.equal(pair.hf.generate(ids, attention_mask=mask), pair.ours.generate(ids, attention_mask=mask))
    assert pair.ours.generation_config.num_beams == 2


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_generation(pair: Pair, ids: torch.Tensor, tmp_path: Path, sampled: bool) -> None:
    draft = Pair("llama", tmp_path)
    for assistant in (draft.hf, draft.ours, pair.hf):
        hf, ours = pair.generate(ids[1:], do_sample=sampled, assistant_model=assistant)
        assert torch.equal(hf, ours)
    plain, _ = pair.generate(ids[1:], do_sample=False)
    _, ours = pair.generate(ids[1:], do_sample=False, assistant_model=draft.ours)
    assert torch.equal(plain, ours)
    _, ours = pair.generate(ids[1:], do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, ours)


def test_a_cache_may_be_gone_on_from(pair: Pair, ids: torch.Tensor) -> None:
    options = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    whole = pair.ours.generate(ids, max_new_tokens=10, **options).sequences
    half = pair.ours.generate(ids, max_new_tokens=5, **options)
    pair.ours.generate(ids[:, :3], max_new_tokens=3, **options)
    rest = pair.ours.generate(half.sequences, max_new_tokens=5, **options, **{CACHE: half[CACHE]})
    assert torch.equal(whole, rest.sequences)


def test_what_cannot_be_had_is_refused(pair: Pair, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"10 rows .* at most 8"):
        pair.ours.generate(ids, num_beams=5, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(InputError, match="n_positions=64"):
        pair.ours.generate(ids, max_new_tokens=70, do_sample=False, pad_token_id=0)
    for mask in (torch.ones_like(ids)[:, 1:], torch.ones_like(ids)[:1], torch.full_like(ids, 2)):
        with pytest.raises(InputError, match="attention_mask"):
            pair.ours.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(InputError, match="output_attentions"):
        pair.ours.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True, pad_token_id=0)


def test_lowered_programs_search_with_beams(tmp_path: Path, ids: torch.Tensor, padded: torch.Tensor) -> None:
    hf = tiny.model("gpt2")
    hf.save_pretrained(tmp_path)
    model = NeuronAutoModelForCausalLM.from_pretrained(
        tmp_path, batch_size=8, n_positions=32, context_length_estimate=16, tp_degree=2, backend="host"
    )
    options = BEAMS | dict(attention_mask=padded, max_new_tokens=NEW, pad_token_id=0)
    ours = HuggingFaceGenerationModelAdapter(hf.config, model).generate(ids, **options)
    np.testing.assert_array_equal(hf.generate(ids, **options), ours)


def test_without_torch_the_adapter_says_so() -> None:
    code = """
import sys
sys.modules["torch"] = None
import jx_neuron
try:
    jx_neuron.HuggingFaceGenerationModelAdapter
except jx_neuron.InputError as error:
    assert "pip install torch" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
