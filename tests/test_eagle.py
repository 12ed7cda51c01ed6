"""EAGLE-3 heads draft from the target's hidden states, and change no token."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import eagle_heads
import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from jx_neuron import InputError, NeuronAutoModelForCausalLM, SamplingParams
from jx_neuron.cli.app import app
from jx_neuron.engine.eagle import EagleDrafter
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.lowering.model import lower_model
from jx_neuron.lowering.verify.checking import verify
from jx_neuron.models import eagle3
from jx_neuron.models.decoder import Decoder
from jx_neuron.serve.async_engine import AsyncEngine
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepOutput

SHAPES = dict(n_positions=[64], context_length_estimate=[16], backend="xla")
GREEDY = SamplingParams(max_tokens=24)
SEEDED = SamplingParams(max_tokens=16, temperature=0.7, top_k=20, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    eagle_heads.target().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(llama: Path) -> NeuronAutoModelForCausalLM:
    return made(llama)


def made(folder: Path, batch: int = 1, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(folder, **SHAPES | dict(batch_size=batch) | options)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, tiny.VOCAB, rng.integers(2, 30)).tolist() for _ in range(count)]


class Seen(EagleDrafter):
    """Keeps what it proposes, with the tokens that it follows and the logits of all rows."""

    def __init__(self, drafter: EagleDrafter):
        super().__init__(drafter.runtime, drafter.taps)
        self.proposals: list[tuple[list[int], list[int], np.ndarray]] = []
        self.output: Any = None
        run = self.runtime.run

        def kept(step: Any) -> StepOutput:
            self.output = run(step)
            return self.output

        self.runtime.run = kept  # type: ignore[method-assign]

    def propose(self, rows: Any) -> Any:
        drafts = super().propose(rows)
        for row, draft in zip(rows, drafts, strict=True):
            if draft:
                logits = np.asarray(self.output.logits)[self._twins[row].slot, : len(draft)]
                self.proposals.append((list(row.tokens), list(draft), logits))
        return drafts


def seen(model: NeuronAutoModelForCausalLM, folder: Path) -> Seen:
    """The head in `folder`, of which every proposal is kept."""
    drafter = Seen(model.drafter(folder))
    model._heads[str(folder.resolve())] = drafter
    return drafter


def check_against_torch(
    hf: torch.nn.Module, head: eagle_heads.Head, config: Any, taps: list[int], drafter: Seen
) -> None:
    embedding = hf.get_input_embeddings().weight.detach()
    for tokens, draft, logits in drafter.proposals:
        known = eagle_heads.features(hf, tokens[:-1], taps)
        expected, of_torch = eagle_heads.draft(head, config, embedding, tokens, known, len(draft))
        assert draft == expected
        np.testing.assert_allclose(logits[:, : len(head["d2t"])], of_torch, atol=2e-4)


def test_drafts_are_those_of_torch_and_tokens_those_without(one: NeuronAutoModelForCausalLM, tmp_path: Path) -> None:
    taps = [3, 1, 2]
    head, config = eagle_heads.random_head(eagle_aux_hidden_state_layer_ids=taps)
    drafter, rows = seen(one, eagle_heads.saved(head, config, tmp_path / "head")), [[3, 1, 4, 1, 5], [9, 2, 6]]
    plain, drafted = one.generate(rows, GREEDY), one.generate(rows, GREEDY, draft=drafter)
    assert [g.ids for g in drafted] == [g.ids for g in plain]
    assert len(drafter.proposals) == sum(g.answers[0].drafts.steps for g in drafted) >= 6
    check_against_torch(eagle_heads.target(), head, config, taps, drafter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "model_type", "tp_degree"),
    [
        ({}, "llama", 1),
        ({"norm_before_residual": True, "attention_bias": True}, "qwen3", 1),
        ({"draft_vocab_size": 41, "intermediate_size": 66}, "llama", 2),
    ],
)
def test_drafts_are_those_of_torch(fields: Any, model_type: str, tp_degree: int, tmp_path: Path) -> None:
    hf = eagle_heads.target(model_type, layers=7)
    hf.save_pretrained(tmp_path / "target")
    head, config = eagle_heads.random_head(**fields)
    model = made(tmp_path / "target", 2, tp_degree=tp_degree)
    drafter = seen(model, eagle_heads.saved(head, config, tmp_path / "head"))
    drafter.pause = 0
    model.generate(prompts(4), GREEDY, draft=drafter)
    assert {len(draft) for _, draft, _ in drafter.proposals} >= {1, 3}
    check_against_torch(hf, head, config, [2, 3, 4], drafter)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "tp_degree"), [(1, 1), (4, 1), (4, 2)])
def test_tokens_are_those_without_a_head(llama: Path, batch: int, tp_degree: int, tmp_path: Path) -> None:
    head, count = eagle_heads.saved(*eagle_heads.random_head(), tmp_path / "head"), 60
    model = made(llama, batch, tp_degree=tp_degree)
    for sampling in (GREEDY, SEEDED):
        several = [replace(sampling, seed=n) for n in range(count)]
        plain = model.generate(prompts(count), several)
        drafted = model.generate(prompts(count), several, draft=head)
        assert [g.ids for g in drafted] == [g.ids for g in plain]
        assert sum(g.answers[0].drafts.proposed for g in drafted) > count


@pytest.mark.slow
def test_a_head_that_agrees_with_its_target_is_believed(tmp_path: Path) -> None:
    hf = eagle_heads.target()
    head = eagle_heads.saved(*eagle_heads.agreeing(hf), tmp_path / "head")
    hf.save_pretrained(tmp_path / "target")
    model = made(tmp_path / "target", 2)
    plain = model.generate(prompts(3), GREEDY)
    drafted = model.generate(prompts(3), GREEDY, draft=str(head))
    assert [g.ids for g in drafted] == [g.ids for g in plain]
    for generation in drafted:
        drafts = generation.answers[0].drafts
        assert drafts.accepted == drafts.proposed == len(generation.ids) - 1 - drafts.steps
        assert drafts.steps <= 4


@pytest.mark.slow
def test_tokens_of_others_are_not_needed(llama: Path, tmp_path: Path) -> None:
    """Of a kept prefix, and of another answer to the same prompt, the head has no features."""
    head = eagle_heads.saved(*eagle_heads.random_head(), tmp_path / "head")
    model, prefix = made(llama, 4), prompts(1)[0]
    rows, sampling = [[*prefix, 5, 6], [*prefix, 7], [*prefix, 5, 6, 8]], replace(SEEDED, n=2)
    model.keep_prefix(prefix)
    plain, drafted = model.generate(rows, sampling), model.generate(rows, sampling, draft=head)
    assert [[a.ids for a in g.answers] for g in drafted] == [[a.ids for a in g.answers] for g in plain]
    assert all(answer.drafts.proposed for generation in drafted for answer in generation.answers)


@pytest.mark.slow
def test_programs_pass_on_every_target(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    target = Decoder.from_config(config, 2)
    head = Decoder.made("eagle3", eagle3, eagle3.Config.from_hf(eagle_heads.CONFIG), 2)
    verifies = ProgramKey("verify", 2, 4, 64, 16, taps=(2, 3))
    programs = [*lower_model(target, [verifies, replace(verifies, taps=())], 2, 64, np.float32)]
    programs += lower_model(head, [ProgramKey("draft", 2, 4, 64, guesses=3)], 2, 64, np.float32)
    features = programs[0].outputs[2]
    assert (features.kind, features.shape) == ("output", (2, 4, 2, eagle_heads.D))
    assert [output.kind for output in programs[1].outputs[:3]] == ["output", "output", "state"]
    for program in programs:
        for family in ("inf2", "trn1", "trn2"):
            assert not verify(program.hlo_module, family), (program.name, family)


@pytest.mark.slow
def test_a_server_drafts_by_a_head(llama: Path, tmp_path: Path) -> None:
    head = eagle_heads.saved(*eagle_heads.random_head(), tmp_path / "head")
    model, prompt = made(llama, 2), prompts(1)[0]
    (plain,) = model.generate([prompt], GREEDY)

    async def main() -> list[int]:
        engine = AsyncEngine(model, draft=head)
        engine.start()
        while not engine.healthy:
            await asyncio.sleep(0.01)
        known = set(model.drafter(head).runtime._compiled)
        tokens = [event.token async for event in engine.submit(prompt, GREEDY)]
        await engine.shutdown(10)
        assert set(model.drafter(head).runtime._compiled) == known
        return tokens

    assert asyncio.run(main()) == list(plain.ids)


@pytest.mark.slow
def test_the_command_line_takes_a_head(llama: Path, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(llama)
    head = eagle_heads.saved(*eagle_heads.random_head(), tmp_path / "head")
    command = ["sample", str(llama), "abc", "--max-new-tokens", "12", "--n-positions", "64", "--json"]
    answers = []
    for more in ([], ["--draft", str(head)]):
        result = CliRunner().invoke(app, command + more)
        assert result.exit_code == 0, result.output
        answers.append(json.loads(result.stdout))
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[1]["drafted"] > 0


def without(name: str) -> Any:
    return lambda head, config: head.pop(name)


def changed(name: str, value: Any) -> Any:
    return lambda head, config: config.__setitem__(name, value)


def beyond(head: eagle_heads.Head, config: Any) -> None:
    head["d2t"][-1] = tiny.VOCAB


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (without("midlayer.hidden_norm.weight"), CheckpointError, "midlayer.hidden_norm.weight"),
        (without("d2t"), CheckpointError, "d2t"),
        (beyond, CheckpointError, f"its token 39 token {39 + tiny.VOCAB}"),
        (lambda head, _: head.__setitem__("fc.weight", torch.zeros(48, 96)), CheckpointError, "fc.weight"),
        (lambda head, _: head.__setitem__("d2t", head["d2t"].float()), CheckpointError, "float32"),
        (changed("hidden_size", 64), ConfigError, "hidden_size=64, and the model 48"),
        (changed("target_hidden_size", 64), ConfigError, "target_hidden_size=64"),
        (changed("vocab_size", 99), ConfigError, "vocab_size=99"),
        (changed("num_hidden_layers", 2), ConfigError, "num_hidden_layers=2"),
        (changed("eagle_config", {"use_aux_hidden_state": False}), ConfigError, "use_aux_hidden_state"),
        (changed("eagle_aux_hidden_state_layer_ids", [1, 2, 4]), ConfigError, "0 to 3"),
        (changed("eagle_aux_hidden_state_layer_ids", [1, 2]), ConfigError, "3 of these"),
        (changed("norm_before_fc", True), ConfigError, "norm_before_fc"),
        (changed("architectures", ["LlamaForCausalLM"]), InputError, "LlamaForCausalLMEagle3"),
    ],
)
def test_bad_heads_are_refused(
    one: NeuronAutoModelForCausalLM, damage: Any, error: Any, words: str, tmp_path: Path
) -> None:
    head, config = eagle_heads.random_head()
    damage(head, config)
    with pytest.raises(error, match=words):
        one.drafter(eagle_heads.saved(head, config, tmp_path / "head"))


def test_targets_that_a_head_cannot_draft_for_are_refused(
    one: NeuronAutoModelForCausalLM, llama: Path, tmp_path: Path
) -> None:
    head = eagle_heads.saved(*eagle_heads.random_head(), tmp_path / "head")
    host = NeuronAutoModelForCausalLM.from_pretrained(llama, backend="host", n_positions=[64])
    host.enable_speculative_decoder(4)
    with pytest.raises(ConfigError, match="backend 'host' give no hidden states"):
        host.drafter(head)
    other = NeuronAutoModelForCausalLM.from_pretrained(tiny.saved("gpt2", tmp_path / "gpt2"), backend="xla")
    with pytest.raises(ConfigError, match="'gpt2'"):
        other.drafter(head)
    with pytest.raises(ConfigError, match="another model"):
        one.drafter(made(llama).drafter(head))


def test_the_layers_that_a_feature_is_made_of() -> None:
    def taps(**fields: Any) -> tuple[int, ...]:
        return eagle3.Config.from_hf(eagle_heads.CONFIG | fields).taps(94)

    ids = "eagle_aux_hidden_state_layer_ids"
    assert taps() == (2, 47, 91)
    assert taps(eagle_config={ids: [1, 46, 90], "use_aux_hidden_state": True}) == (2, 47, 91)
    assert taps(**{ids: [2, 47, 90]}) == (2, 47, 90)
