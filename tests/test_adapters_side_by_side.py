"""Several LoRA adapters in one program, one a row, against peft and against each alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import pytest
import serving
import tiny
import torch
from families import OPTIONS
from test_adapters import CASES, trained
from test_families import random_model

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig
from jx_neuron.cli.app import run
from jx_neuron.engine.options import SamplingParams
from jx_neuron.engine.sequence import Sequence
from jx_neuron.engine.slots import Slots
from jx_neuron.errors import ArtifactError, CheckpointError, ConfigError, InputError
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.nn.adapters import Adapters
from jx_neuron.serve import AsyncEngine, ServerSettings, app
from jx_neuron.step.program_key import ProgramKey

FAMILIES = "llama qwen2 qwen3 gemma3 gpt2 phi3 mixtral falcon".split()
ALWAYS = ["phi3"]
KINDS = [
    dict(target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=12),
    dict(target_modules=["o_proj", "gate_proj", "lm_head"], r=6, lora_alpha=5),
    dict(target_modules=["k_proj", "up_proj"], layers_to_transform=[1], use_rslora=True),
]
ROWS = ["a0", None, "a1", "a2"]


def load(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    options = dict(n_positions=32, batch_size=4, neuron_config=NeuronConfig(output_all_logits=True)) | options
    return NeuronAutoModelForCausalLM.from_pretrained(folder, **options)


def second(options: dict[str, Any]) -> dict[str, Any]:
    """Another adapter of the same kind: of other modules' ranks, and another scale."""
    return {name: value for name, value in options.items() if name != "rank_pattern"} | dict(r=5, lora_alpha=9)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in ALWAYS else pytest.mark.slow) for c in FAMILIES])
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base = random_model(name, OPTIONS[name][0])
    base.save_pretrained(tmp_path / "base")
    one = trained(base, tmp_path / "one", **options)
    other = trained(base, tmp_path / "other", **second(options))
    ours = load(tmp_path / "base", adapters={"one": tmp_path / "one", "other": tmp_path / "other"})
    ids = np.random.default_rng(0).integers(0, ours.settings.vocab_size, (3, 24))
    logits, plain = ours(ids, adapter=["other", None, "one"]), tiny.logits(base, ids)
    for row, theirs in enumerate((other, base, one)):
        expected = tiny.logits(theirs, ids[row : row + 1])
        scale = max(1.0, float(np.abs(expected).max()))
        assert theirs is base or np.abs(expected - plain[row]).max() > 0.05 * scale
        np.testing.assert_allclose(logits[row : row + 1], expected, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `base`, and adapters of it, `a0` to `a2`, of different matrices and ranks."""
    folder, model = tmp_path_factory.mktemp("llama"), tiny.model("llama")
    model.save_pretrained(folder / "base")
    for number, options in enumerate(KINDS):
        trained(model, folder / f"a{number}", **options)
    return folder


def named(folder: Path) -> dict[str, Path]:
    return {f"a{number}": folder / f"a{number}" for number in range(len(KINDS))}


def greedy(model: NeuronAutoModelForCausalLM, ids: np.ndarray, adapter: Any, **options: Any) -> list[tuple[int, ...]]:
    sampling = SamplingParams(max_tokens=12, top_k=1)
    return [one.ids for one in model.generate(ids.tolist(), sampling, adapter=adapter, **options)]


@pytest.fixture(scope="module")
def model(llama: Path) -> NeuronAutoModelForCausalLM:
    return load(llama / "base", adapters=named(llama))


@pytest.mark.slow
def test_tokens_are_those_of_each_merged(llama: Path, model: NeuronAutoModelForCausalLM) -> None:
    ids = tiny.prompts(4, 9)
    tokens = greedy(model, ids, ROWS)
    for row, name in enumerate(ROWS):
        alone = load(llama / "base", batch_size=1, **({} if name is None else dict(adapter=llama / name)))
        assert greedy(alone, ids[row : row + 1], None) == [tokens[row]]
    assert model.sample(ids, 21, top_k=1, adapter=ROWS)[:, 9:].tolist() == [list(row) for row in tokens]
    assert len({*greedy(model, ids[:1].repeat(4, 0), ROWS)}) == 4


@pytest.mark.slow
def test_eight_in_a_batch_equal_each_alone(tmp_path: Path) -> None:
    base = tiny.model("llama")
    base.save_pretrained(tmp_path / "base")
    names = [f"n{number}" for number in range(8)]
    theirs = [trained(base, tmp_path / name, r=1 + n, **_of(n)) for n, name in enumerate(names)]
    ours = load(tmp_path / "base", batch_size=8, adapters={name: tmp_path / name for name in names})
    ids = tiny.prompts(8, 16)
    logits, tokens = ours(ids, adapter=names), greedy(ours, ids, names)
    for n, name in enumerate(names):
        np.testing.assert_allclose(ours(ids[n : n + 1], adapter=name), logits[n : n + 1], rtol=0, atol=1e-5)
        alone = load(tmp_path / "base", batch_size=1, adapters={"it": tmp_path / name})
        np.testing.assert_allclose(alone(ids[n : n + 1], adapter="it"), logits[n : n + 1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(tiny.logits(theirs[n], ids[n : n + 1]), logits[n : n + 1], rtol=0, atol=1e-4)
        assert greedy(alone, ids[n : n + 1], "it") == [tokens[n]]
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    together = ours.generate(ids.tolist(), sampling, adapter=names)
    for n, name in enumerate(names):
        assert ours.generate([ids[n].tolist()], sampling, adapter=name)[0].ids == together[n].ids


def _of(number: int) -> dict[str, Any]:
    """What adapter `number` changes: different matrices, from different weights."""
    torch.manual_seed(number)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return dict(target_modules=modules[number % 4 : 3 + number % 5], lora_alpha=3 + 2 * number)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(backend="host", tp_degree=2), id="host", marks=pytest.mark.slow),
        pytest.param(dict(tp_degree=2), id="xla", marks=pytest.mark.slow),
        pytest.param(dict(backend="host", tp_degree=3), id="padded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:tp_degree:UserWarning")
def test_cores_share_adapters(options: dict[str, Any], llama: Path, model: NeuronAutoModelForCausalLM) -> None:
    ids = tiny.prompts(4, 9)
    ours = load(llama / "base", adapters=named(llama), **options)
    np.testing.assert_allclose(ours(ids, adapter=ROWS), model(ids, adapter=ROWS), rtol=0, atol=1e-4)
    assert greedy(ours, ids, ROWS) == greedy(model, ids, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_have_whole_adapters(kind: str, llama: Path) -> None:
    quant = replace(QuantizationConfig.named(kind), **(dict(group_size=6) if kind == "int4" else {}))
    config, ids = NeuronConfig(output_all_logits=True, quant=quant), tiny.prompts(4, 9)
    ours = load(llama / "base", adapters=named(llama), neuron_config=config)
    plain = load(llama / "base", neuron_config=config)
    logits = ours(ids, adapter=ROWS)
    np.testing.assert_allclose(logits[1], plain(ids)[1], rtol=0, atol=1e-5)
    host = load(llama / "base", adapters=named(llama), neuron_config=config, backend="host")
    np.testing.assert_allclose(host(ids, adapter=ROWS), logits, rtol=0, atol=2e-3 * float(np.abs(logits).max()))


def test_slots_hold_what_one_adapter_computed() -> None:
    slots, tokens = Slots(2, 4), list(range(9))
    first = Sequence(list(tokens), adapter=1)
    assert slots.admit(first, [], 0) == ([], 0)
    first.computed = 9
    for owned in (True, False):
        slot = next(iter(slots))
        of_each = [slots.reusable(Sequence(list(tokens), adapter=number), slot) for number in (0, 1, 2)]
        assert of_each == [0, 8, 0], owned
        slots.release(first)
    slots.keep_prefix(first, aside=True)
    assert [slots.reusable(Sequence([*tokens, 9], adapter=number), [*slots][-1]) for number in (0, 1)] == [0, 9]
    assert Sequence(list(tokens), adapter=1).fork().adapter == 1


@pytest.mark.slow
def test_what_an_adapter_computed_serves_no_other(llama: Path, model: NeuronAutoModelForCausalLM) -> None:
    ids = tiny.prompts(1, 20).repeat(2, 0)
    expected = {name: greedy(load(llama / "base", adapters=named(llama)), ids[:1], name) for name in ("a0", "a1")}
    engine = model.engine
    for name in ("a0", "a1", "a0", "a1"):
        assert greedy(model, ids[:1], name) == expected[name]
    model.keep_prefix(ids[0, :16], adapter="a0")
    before = engine.scheduler.prefix_hits
    assert greedy(model, ids[:1], "a1") == expected["a1"]
    assert engine.scheduler.prefix_hits == before
    assert greedy(model, ids[:1], "a0") == expected["a0"]
    assert engine.scheduler.prefix_hits == before + 16
    model.keep_prefix(None)


@pytest.mark.parametrize("draft", ["ngram", "model"])
@pytest.mark.slow
def test_drafts_are_verified_by_the_rows_adapter(draft: str, llama: Path, model: NeuronAutoModelForCausalLM) -> None:
    ids = np.tile(tiny.prompts(4, 3), 4)
    guess = draft if draft == "ngram" else load(llama / "base")
    assert greedy(model, ids, ROWS, draft=guess) == greedy(model, ids, ROWS)


@pytest.mark.slow
def test_several_answers_and_scores(llama: Path, model: NeuronAutoModelForCausalLM) -> None:
    ids = tiny.prompts(2, 9).tolist()
    sampling = SamplingParams(max_tokens=6, n=2, temperature=1.0, seed=5)
    merged = load(llama / "base", adapter=llama / "a1")
    (ours,), (theirs,) = model.generate(ids[:1], sampling, adapter="a1"), merged.generate(ids[:1], sampling)
    assert [answer.ids for answer in ours.answers] == [answer.ids for answer in theirs.answers]
    scores = model.score(ids, adapter=["a1", None])
    assert scores[0].log_likelihood == pytest.approx(merged.score(ids[:1])[0].log_likelihood, abs=1e-3)
    assert scores[1].log_likelihood == pytest.approx(load(llama / "base").score(ids[1:])[0].log_likelihood, abs=1e-3)


@pytest.mark.slow
def test_logits_go_on_by_the_adapter_of_their_prompt(model: NeuronAutoModelForCausalLM) -> None:
    ids = tiny.prompts(2, 12)
    whole = model(ids, adapter=["a0", "a1"])
    model(ids[:, :9], adapter=["a0", "a1"])
    np.testing.assert_allclose(model(ids[:, 9:], cache_ids=[9]), whole[:, 9:], rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="adapter goes with prompts alone"):
        model(ids[:, :1], cache_ids=[12], adapter="a0")


def test_programs_take_adapters_beside_what_they_took() -> None:
    decoder = Decoder.from_config(tiny.CONFIGS["llama"]().to_dict(), 2)
    adapters = Adapters(("one",), 4, ("layers.{i}.self_attn.o_proj.kernel",))
    key = ProgramKey("decode", 2, 1, 32, 8)
    (plain,), (adapted,) = (
        lower_model(one, [key], 2, 32, jnp.float32) for one in (decoder, decoder.with_adapters(adapters))
    )
    own, more = ({tensor.name: tensor for tensor in program.inputs} for program in (plain, adapted))
    added = {f"layers.{layer}.self_attn.o_proj.{part}" for layer in (0, 1) for part in ("lora_a", "lora_b")}
    assert more.keys() - own.keys() == added | {"adapter_b"}
    assert own == {name: tensor for name, tensor in more.items() if name in own}
    a, b = (more[f"layers.0.self_attn.o_proj.{part}"] for part in ("lora_a", "lora_b"))
    assert (a.shape, a.split_axis, b.shape, b.split_axis) == ((2, 2, 12, 4), 1, (2, 4, 48), None)


@pytest.mark.slow
def test_lowered_programs_pass_every_check(llama: Path) -> None:
    config = NeuronConfig(output_all_logits=True, speculation_length=4)
    ours = load(llama / "base", adapters=named(llama), backend="host", tp_degree=2, amp="bf16", neuron_config=config)
    for target in ("inf2", "trn1", "trn2"):
        for name, violations in ours.lowered().violations(target):
            assert [str(v) for v in violations if v.severity == "error"] == [], name


@pytest.mark.slow
def test_a_saved_model_has_its_adapters(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = load(llama / "base", adapters=named(llama), backend="host", neuron_config=NeuronConfig())
    saved, ids = ours.save(tmp_path / "saved", sharded_weights=True), tiny.prompts(4, 9)
    alone = NeuronAutoModelForCausalLM.from_pretrained(saved, backend="host")
    tokens = greedy(alone, ids, ROWS)
    assert tokens == greedy(ours, ids, ROWS)
    with pytest.raises(ArtifactError, match="adapters"):
        load(llama / "base", backend="host", neuron_config=NeuronConfig()).load(saved)
    with pytest.raises(ArtifactError, match="no adapter"):
        load(saved, adapters=named(llama))
    with pytest.raises(ConfigError, match="adapters side by side"):
        ours.save_pretrained(tmp_path / "written")
    prompt = ",".join(map(str, ids[0]))
    assert run(["sample", str(saved), "--ids", prompt, "--max-new-tokens", "12", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["adapter"] for answer in answers] == ["a0", "a1", "a2"]
    assert answers[0]["tokens"] == list(tokens[0])


def test_refused(llama: Path, model: NeuronAutoModelForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="adapter='b' is no adapter of this model; it has 'a0', 'a1', 'a2'"):
        model.generate([[1, 2]], adapter="b")
    with pytest.raises(InputError, match="one value for all rows, or 1"):
        model.generate([[1, 2]], adapter=["a0", "a1"])
    with pytest.raises(ConfigError, match="a mapping of names"):
        load(llama / "base", adapters=["a0"])
    with pytest.raises(CheckpointError, match="no such folder or file"):
        load(llama / "base", adapters={"a": llama / "nowhere"})
    assert run(["sample", str(llama / "base"), "--ids", "1", "--adapters", "a0"]) == 2
    assert "NAME=DIR" in capsys.readouterr().err


def test_what_is_no_matrix_of_a_layer_is_refused(tmp_path: Path) -> None:
    name, options = CASES["deepseek_v3"]
    base = random_model(name, OPTIONS[name][0])
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "adapter", **options)
    with pytest.raises(CheckpointError, match=r"kv_b_proj, which takes no adapters side by side.*--adapter"):
        load(tmp_path / "base", adapters={"one": tmp_path / "adapter"})


@pytest.mark.slow
def test_adapters_are_models_of_a_server(tmp_path: Path) -> None:
    base = tiny.model("llama")
    folder = serving.checkpoint(tmp_path / "base")
    trained(base, tmp_path / "a0", **KINDS[0])
    model = serving.model(folder, adapters={"french": tmp_path / "a0"})
    fields = dict(prompt=tiny.prompts(1, 9)[0].tolist(), max_tokens=8, temperature=0, return_token_ids=True)
    with serving.running(model) as url, httpx.Client(base_url=url, timeout=120) as client:
        cards = {card["id"]: card["parent"] for card in client.get("/v1/models").json()["data"]}
        assert cards == {"tiny": None, "other": None, "french": "tiny"}
        answers = {
            name: client.post("/v1/completions", json=fields | dict(model=name)).json()
            for name in ("tiny", "french", "absent")
        }
    assert answers["absent"]["error"]["code"] == "model_not_found"
    tokens = {name: answers[name]["choices"][0]["token_ids"] for name in ("tiny", "french")}
    ids, sampling = [fields["prompt"]], SamplingParams(max_tokens=8, top_k=1)
    for name, adapter in (("tiny", None), ("french", "french")):
        assert answers[name]["model"] == name
        assert tokens[name] == list(model.generate(ids, sampling, adapter=adapter)[0].ids)
    assert tokens["tiny"] != tokens["french"]
    settings = ServerSettings(names=("french",))
    with pytest.raises(InputError, match="'french' is the name of the model, and of an adapter"):
        app(model, AsyncEngine(model), settings)
