"""Artifacts of quantized models: what they hold is what their settings say."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import tiny
from artifacts import reseal

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig
from jx_neuron.cli.app import run
from jx_neuron.runtime.saved import SavedModel

QUANT = {
    "s8": QuantizationConfig(lm_head=True),
    "f8e4m3fn": QuantizationConfig(quant_dtype="f8e4m3fn"),
    "int4": QuantizationConfig(quant_dtype="int4", group_size=2),
    "none": None,
}
OUT = "layers.0.self_attn.o_proj.kernel"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tiny.saved("llama", tmp_path_factory.mktemp("llama"))

    def save(quant: QuantizationConfig | None, name: str) -> Path:
        model = NeuronAutoModelForCausalLM.from_pretrained(
            folder, n_positions=16, context_length_estimate=16, backend="host", neuron_config=NeuronConfig(quant=quant)
        )
        return model.save(tmp_path_factory.mktemp("saved") / name, sharded_weights=True)

    return {name: save(quant, name) for name, quant in QUANT.items()}


@pytest.mark.parametrize("name", QUANT)
def test_what_is_saved_is_taken(name: str, saved: dict[str, Path]) -> None:
    assert SavedModel.open(saved[name]).deployment.settings.quant == QUANT[name]


def settings(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["settings"]["quant"].update(fields)


def unquantized(manifest: dict[str, Any]) -> None:
    manifest["settings"]["quant"] = None


def quantized(manifest: dict[str, Any]) -> None:
    manifest["settings"]["quant"] = {"quant_dtype": "s8"}


def without_offsets(manifest: dict[str, Any]) -> None:
    """As programs were before int4 had them."""
    for program in manifest["programs"]:
        for tensor in program["inputs"]:
            tensor["name"] = tensor["name"].replace(".offsets", ".others")


INT8, INT4 = "codes int8, scales float32", "codes uint8, scales float16, offsets float16"
CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "another dtype": ("f8e4m3fn", settings(quant_dtype="s8"), f"(quant_dtype='s8') have {INT8}"),
    "int8 as fp8": ("s8", settings(quant_dtype="f8e4m3fn"), "have codes float8_e4m3, scales float32"),
    "int4 as int8": ("int4", settings(quant_dtype="s8", group_size=None), f"has {INT4}, where"),
    "another group": ("int4", settings(group_size=4), "are not of group_size=4"),
    "int4 before offsets": ("int4", without_offsets, f"(quant_dtype='int4') have {INT4} or {INT8}"),
    "a head": ("s8", settings(lm_head=False), "lm_head.embedding has codes int8, scales float32, where"),
    "a matrix kept": ("s8", settings(keep=[OUT]), f"{OUT} has {INT8}, where its settings (quant_dtype='s8') have"),
    "no quantization": ("s8", unquantized, "(quant=None) have nothing quantized"),
    "no codes": ("none", quantized, "its settings have quant_dtype='s8', and it takes no codes"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_artifact_of_another_quantization_is_refused(
    change: str, saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, alter, reason = CHANGES[change]
    folder = copytree(saved[name], tmp_path / "changed")
    reseal(folder, alter)
    assert run(["sample", str(folder), "text"]) == 2
    error = capfd.readouterr().err
    assert reason in " ".join(error.split())
    assert "save it again" in error
