"""Drafts change how fast tokens come, and never which."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from jx_neuron import InputError, NeuronAutoModelForCausalLM, NeuronConfig, SamplingParams
from jx_neuron.engine.drafting import NgramDrafter, Speculation
from jx_neuron.errors import ConfigError
from jx_neuron.llm.speculation import FusedSpeculativeDecoder, SpeculativeGenerator
from jx_neuron.serve.async_engine import AsyncEngine

SHAPES = dict(n_positions=[64], context_length_estimate=[16])
KINDS = {
    "greedy": SamplingParams(max_tokens=24),
    "seeded": SamplingParams(max_tokens=16, temperature=0.7, top_k=20, top_p=0.9, seed=3),
    "on the host": SamplingParams(
        max_tokens=16, temperature=0.5, seed=5, repetition_penalty=1.2, logit_bias={7: 1.0}, logprobs=2
    ),
}
OPTIONS = {
    "nucleus": dict(top_p=0.8, top_p_min_tokens=2, temperature=1.3),
    "least probability": dict(min_p=0.05, temperature=0.9),
    "whole vocabulary": dict(top_k=0, temperature=0.6),
    "penalties": dict(top_k=9, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.1),
    "no n-gram twice": dict(no_repeat_ngram_size=2),
    "biases": dict(temperature=0.8, logit_bias={3: -np.inf, 9: 2.0}, logprobs=1),
    "ends": dict(top_k=12, eos_token_id=[4, 17, 60]),
}
"""The options of SamplingParams that KINDS does not have, but `n`, `stop` and `grammar`."""


@dataclass(eq=False)
class Knows:
    """Drafts what the model answers, and errs at times; a prompt's answer by its tokens."""

    answers: dict[tuple[int, ...], Sequence[int]]
    right: float = 0.8
    pause: int = 1
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    closed: int = 0

    def propose(self, rows: Sequence[Speculation]) -> Sequence[Sequence[int]]:
        return [self.guess(row) for row in rows]

    def guess(self, row: Speculation) -> list[int]:
        prompt = next(prompt for prompt in self.answers if tuple(row.tokens[: len(prompt)]) == prompt)
        known = self.answers[prompt][len(row.tokens) - len(prompt) :][: row.wanted]
        return [token if self.rng.random() < self.right else self.rng.randrange(tiny.VOCAB) for token in known]

    def close(self, row: Speculation) -> None:
        self.closed += 1


def prompts(count: int) -> list[list[int]]:
    """Random ones, half of which repeat themselves."""
    rng = random.Random(1)
    rows = [[rng.randrange(tiny.VOCAB) for _ in range(rng.randint(2, 8))] for _ in range(count)]
    return [row * rng.choice([1, 3]) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"))


def made(folder: Path, backend: str, batch: int, **options: Any) -> NeuronAutoModelForCausalLM:
    config = NeuronConfig(speculation_length=4) if backend == "host" else None
    options = SHAPES | dict(backend=backend, batch_size=batch, neuron_config=config) | options
    return NeuronAutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("backend", "batch", "count"),
    [
        ("xla", 4, 3),
        pytest.param("host", 4, 3, marks=pytest.mark.slow),
        *(pytest.param(backend, batch, 200, marks=pytest.mark.slow) for backend in ("xla", "host") for batch in (1, 4)),
    ],
)
def test_tokens_are_those_without_drafts(folder: Path, backend: str, batch: int, count: int) -> None:
    model, draft = made(folder, backend, batch), made(folder, "xla", batch)
    kinds = dict(KINDS)
    if count > 3:
        kinds |= {name: SamplingParams(max_tokens=16, **options) for name, options in OPTIONS.items()}
    for kind, sampling in kinds.items():
        several = [replace(sampling, seed=n) for n in range(count)]
        plain = model.generate(prompts(count), several)
        answers = {generation.prompt_ids: generation.ids for generation in plain}
        drafters = {"ngram": "ngram", "draft": draft, "own": Knows(answers)}
        for name, drafter in drafters.items():
            drafted = model.generate(prompts(count), several, draft=drafter)
            assert [g.ids for g in drafted] == [g.ids for g in plain], (kind, name)
            assert [a.answers[0].top_logprobs is None for a in drafted] == [sampling.logprobs is None] * count
            accepted = sum(g.answers[0].drafts.accepted for g in drafted)
            proposed = sum(g.answers[0].drafts.proposed for g in drafted)
            assert 0 <= accepted <= proposed
            assert accepted > (proposed / 4 if name == "own" else -1)
        assert drafters["own"].closed >= count - batch  # the last rows are closed by the engine's next step
        assert plain[0].answers[0].drafts is None


def test_each_of_several_answers_has_its_drafts(folder: Path) -> None:
    model, sampling = made(folder, "xla", 4), replace(KINDS["seeded"], n=3)
    prompt = [5, 6, 7] * 4
    (plain,), (drafted,) = model.generate([prompt], sampling), model.generate([prompt], sampling, draft="ngram")
    assert [answer.ids for answer in drafted.answers] == [answer.ids for answer in plain.answers]
    assert all(answer.drafts is not None for answer in drafted.answers)


def test_a_draft_that_ends_an_answer_is_cut_there(folder: Path) -> None:
    model = made(folder, "xla", 1)
    (plain,) = model.generate([[1, 2, 3]], KINDS["greedy"])
    end = plain.ids[5]
    sampling = replace(KINDS["greedy"], eos_token_id=end)
    expected = plain.ids[: plain.ids.index(end) + 1]
    (drafted,) = model.generate([[1, 2, 3]], sampling, draft=Knows({(1, 2, 3): plain.ids}, right=1))
    assert (drafted.ids, drafted.answers[0].finish_reason) == (expected, "stop")


def test_fewer_steps_where_drafts_are_right(folder: Path) -> None:
    model = made(folder, "xla", 1)
    (plain,) = model.generate([[1, 2, 3]], KINDS["greedy"])
    (drafted,) = model.generate([[1, 2, 3]], KINDS["greedy"], draft=Knows({(1, 2, 3): plain.ids}, right=1))
    drafts = drafted.answers[0].drafts
    assert drafts.accepted == drafts.proposed == len(plain.ids) - 1 - drafts.steps
    assert drafts.steps <= 4  # of 4, 8, 8 and 3 tokens


def test_prompt_lookup_copies_what_followed_at_the_latest_place() -> None:
    drafter = NgramDrafter()
    row = Speculation(drafter, [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3], wanted=4)
    assert drafter.propose([row]) == [[6, 7, 1, 2]]
    row.tokens += [9]
    assert drafter.propose([row]) == [()]
    row.tokens += [9]
    assert drafter.propose([row]) == [[9]]
    row.tokens += [9, 9]
    assert drafter.propose([row]) == [[9, 9, 9, 9]]


def test_prompt_lookup_goes_on_behind_what_it_copied() -> None:
    drafter, text = NgramDrafter(), [1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 7, 8, 1, 2, 9, 0]
    row = Speculation(drafter, [*text, 2, 3], wanted=2)
    assert drafter.propose([row]) == [[4, 1]]
    row.tokens += [4, 8]
    assert drafter.propose([row]) == [[1]]  # a single token's place is not where the copy goes on
    row.tokens += [11, 1, 2]
    assert drafter.propose([row]) == [[7, 8]]
    row.tokens += [7, 12, 1, 2]
    assert drafter.propose([row]) == [[9, 0]]
    row.tokens += [9, 13, 5, 6]
    assert drafter.propose([row]) == [[1, 2]]


def test_poor_drafts_pause() -> None:
    row, turns = Speculation(NgramDrafter(pause=2), []), 0
    for _ in range(8):
        while not row.is_due(7):
            turns += 1
        row.verified(3, 0)
    assert turns > 2 * (1 + 2 + 4 + 8)
    row.wait = 0
    for _ in range(20):
        assert row.is_due(100)
        row.verified(row.wanted, row.wanted)
        row.wait = 0
    row.verified(15, 15)
    assert row.wait == 0
    assert row.is_due(100)
    assert row.wanted == 15


class Fails(Knows):
    def propose(self, rows: Sequence[Speculation]) -> Sequence[Sequence[int]]:
        raise ArithmeticError("no guess")


def test_an_error_of_a_drafter_is_that_of_its_answers(folder: Path) -> None:
    model = made(folder, "xla", 1)
    with pytest.raises(ArithmeticError, match="no guess"):
        model.generate([[1, 2, 3]], KINDS["greedy"], draft=Fails({}))
    assert len(model.generate([[1, 2, 3]], KINDS["greedy"])[0].ids) == 24


def test_what_cannot_draft_is_refused(folder: Path) -> None:
    model = made(folder, "xla", 2)
    for draft, error, words in (
        ("lookup", InputError, "ngram"),
        (model, ConfigError, "itself"),
        (made(folder, "xla", 1), ConfigError, "batch_size=2"),
    ):
        with pytest.raises(error, match=words):
            model.generate([[1]], draft=draft)
    compiled = NeuronAutoModelForCausalLM.from_pretrained(folder, backend="host", **SHAPES)
    with pytest.raises(ConfigError, match="speculation_length"):
        compiled.generate([[1]], draft="ngram")
    with pytest.raises(ConfigError, match="speculation_length"):
        NeuronConfig(speculation_length=1)


@pytest.mark.slow
def test_verify_programs_pass_on_every_target_and_are_saved(folder: Path, tmp_path: Path) -> None:
    model = made(folder, "host", 2, tp_degree=2)
    assert [key.name for key in model.settings.programs][-1] == "verify4-b2-s64-k64"
    for target in ("inf2", "trn1", "trn2"):
        assert not [violations for _, violations in model.lowered().violations(target) if violations]
    plain = model.generate([[5, 6] * 4], KINDS["greedy"])
    saved = NeuronAutoModelForCausalLM.from_pretrained(model.save(tmp_path / "saved", sharded_weights=True))
    (drafted,) = saved.generate([[5, 6] * 4], KINDS["greedy"], draft=Knows({(5, 6) * 4: plain[0].ids}))
    assert drafted.ids == plain[0].ids
    assert drafted.answers[0].drafts.accepted > 0


@pytest.mark.slow
def test_the_names_of_transformers_neuronx(folder: Path) -> None:
    model, draft, ids = made(folder, "xla", 2), made(folder, "xla", 2), [[1, 2, 3], [4, 5, 6]]
    compiled = NeuronAutoModelForCausalLM.from_pretrained(folder, backend="host", batch_size=2, **SHAPES)
    greedy, drawn = (model.sample(ids, 20, **options) for options in (dict(top_k=1), dict(seed=1)))
    assert SpeculativeGenerator(draft, model, k=4).sample(ids, 20, seed=1) == drawn
    assert FusedSpeculativeDecoder(draft, compiled, k=3).to_neuron().sample(ids, None, None, 20, top_k=1) == greedy
    assert compiled.settings.speculation == (4,)
    tokens = np.array(greedy)
    compiled(tokens[:, :12])
    logits = compiled.speculative_forward(tokens[:, 12:16], cache_ids=12, speculation_length=4)
    assert (logits.argmax(-1) == tokens[:, 13:17]).all()
    with pytest.raises(ConfigError, match="before to_neuron"):
        compiled.enable_speculative_decoder(8)
    with pytest.raises(ConfigError, match="acceptor"):
        SpeculativeGenerator(draft, model, acceptor=max)


@pytest.mark.slow
def test_a_server_drafts(folder: Path) -> None:
    model, prompt = made(folder, "xla", 2), [5, 6, 7] * 4
    (plain,) = model.generate([prompt], KINDS["greedy"])

    async def main() -> list[int]:
        engine = AsyncEngine(model, draft=Knows({tuple(prompt): plain.ids}))
        engine.start()
        while not engine.healthy:
            await asyncio.sleep(0.01)
        tokens = [event.token async for event in engine.submit(prompt, KINDS["greedy"])]
        await engine.shutdown(10)
        return tokens

    assert asyncio.run(main()) == list(plain.ids)


def test_a_draft_model_reads_a_long_prompt_once_a_draft_is_accepted(folder: Path) -> None:
    model, draft = made(folder, "xla", 1), made(folder, "xla", 1)
    drafter, row = model.drafter(draft), Speculation(NgramDrafter(), list(range(1, 44)), wanted=3)
    ends = []
    for _ in range(3):
        (guess,) = drafter.propose([row])
        ends.append((len(drafter._twins[row].sequence.tokens), len(guess)))
        row.verified(3, 1)
    (expected,) = draft.generate([row.tokens], SamplingParams(max_tokens=4))
    assert ends == [(32 + 4, 4), (43 + 4, 4), (43 + 4, 4)]
    assert tuple(guess) == expected.ids
