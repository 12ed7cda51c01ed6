"""jx-neuron models and jx-neuron info: what they say, for every kind of model, without reading weights."""

import json
from pathlib import Path

import peft
import pytest
import tiny
from test_cli import run

from jx_neuron import NeuronAutoModelForCausalLM
from jx_neuron.checkpoint.tensor_files import Tensor
from jx_neuron.models import model_types
from jx_neuron.models.known import KNOWN
from jx_neuron.planning import plan

UNREAD = "jx-neuron info reads no tensor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"))


def info(*arguments: object) -> dict:
    done = run("info", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_folder_is_described_without_reading_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "slices", lambda _: pytest.fail(UNREAD))
    facts, hf = info(folder), tiny.model("llama")
    assert facts["parameters"] == facts["active_parameters"] == sum(p.numel() for p in hf.parameters())
    assert facts["stored"] == {"dtypes": {"float32": 4 * facts["parameters"]}, "method": None}
    f32, bf16 = facts["forms"]["f32"], facts["forms"]["bf16"]
    assert f32["weights"] == 2 * bf16["weights"] == 4 * facts["parameters"]
    # keys and values of two layers, two heads of 12
    assert (bf16["cache_of_a_token"], bf16["cache"]) == (2 * 2 * 2 * 12 * 2, tiny.POSITIONS * 2 * 2 * 2 * 12 * 2)
    assert bf16["fits_here"]
    assert facts["sizes"]["heads"] == 4


def test_the_smallest_instance_is_that_of_a_plan() -> None:
    facts = info("facebook/opt-13b")
    expected = plan(KNOWN["facebook/opt-13b"], amp="bf16")
    assert next(iter(facts["forms"]["bf16"]["instances"].items())) == (expected.instance, expected.tp_degree)
    text = run("info", "facebook/opt-13b").stdout
    assert f"{expected.instance} at tp {expected.tp_degree}" in text
    assert f"{facts['parameters']:,}" in text


def test_a_lora_adapter_names_its_base(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], base_model_name_or_path="base")
    model = peft.get_peft_model(tiny.model("llama"), lora)
    model.save_pretrained(tmp_path)
    facts = info(tmp_path)["adapter"]
    assert (facts["r"], facts["alpha"], facts["matrices"]) == (4, 8, 4)
    assert facts["parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert "--adapter" in run("info", tmp_path).stdout


@pytest.mark.slow
def test_a_saved_model_says_what_it_was_made_for(folder: Path, tmp_path: Path) -> None:
    model = NeuronAutoModelForCausalLM.from_pretrained(folder, tp_degree=2, n_positions=16, backend="host")
    facts = info(model.save(tmp_path / "saved", sharded_weights=True))["saved"]
    assert (facts["tp_degree"], facts["n_positions"], facts["compiled"]) == (2, 16, False)
    assert "not compiled for no target yet" in run("info", tmp_path / "saved").stdout


@pytest.mark.slow
def test_the_demo_is_a_gguf_file() -> None:
    facts = info("--demo")
    assert facts["parameters"] == 134515008
    assert facts["stored"]["method"] == "gguf"
    assert set(facts["stored"]["dtypes"]) > {"Q4_1", "F32"}


@pytest.mark.parametrize("arguments", [(), ("./nowhere",), ("gpt2", "--demo")])
def test_what_is_no_model_is_refused(arguments: tuple[str, ...]) -> None:
    done = run("info", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_families_and_checkpoints_are_listed_by_name() -> None:
    assert list(json.loads(run("models", "--json").stdout)) == model_types()
    (gpt2,) = json.loads(run("models", "gpt2-x", "--json").stdout).values()
    assert set(gpt2["checkpoints"].values()) == {1557611200}
    assert "1.56 B  gpt2-xl" in run("models", "gpt2-x").stdout
    done = run("models", "no-such-model")
    assert (done.returncode, done.stdout) == (2, "")
