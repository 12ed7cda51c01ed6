"""LoRA adapters, against peft: on Hugging Face's models, and merged here as a checkpoint is read."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import tiny
import torch
from families import OPTIONS
from safetensors.numpy import load_file, save_file
from test_families import random_model
from test_multimodal import random_model as multimodal

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig
from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.checkpoint.lora import ADAPTER_CONFIG
from jx_neuron.cli.app import run
from jx_neuron.errors import ArtifactError, CheckpointError

WEIGHTS = "adapter_model.safetensors"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(target_modules=["q_proj", "k_proj", "down_proj", "lm_head"], r=4, lora_alpha=12)),
    "qwen2": ("qwen2", dict(target_modules=["v_proj", "o_proj"], layers_to_transform=[1])),
    "qwen3": ("qwen3", dict(target_modules="all-linear", r=6, use_rslora=True)),
    "gemma3": (
        "gemma3_text",
        dict(
            target_modules=r".*layers\.[02]\.(self_attn|mlp)\.\w+_proj",
            exclude_modules=["up_proj"],
            r=3,
            rank_pattern={"q_proj": 5, r"layers\.2\.mlp\.\w+": 2},
            alpha_pattern={"layers.0.self_attn.k_proj": 31},
        ),
    ),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "phi3": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"])),
    "mixtral": (
        "mixtral",
        dict(target_modules=["q_proj", "o_proj"], layers_to_transform=0, layers_pattern="layers"),
    ),
    "deepseek_v3": ("deepseek_v3", dict(target_modules=["kv_b_proj", "kv_a_proj_with_mqa", "o_proj"])),
    "falcon": ("falcon", dict(target_modules=["query_key_value", "dense"])),
}
ALWAYS = ("gpt2",)


def trained(model: Any, folder: Path, **options: Any) -> Any:
    """PEFT's model of `model`, with random A and B, which are saved in `folder`."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(deepcopy(model), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def load(folder: Path, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(
        folder, n_positions=32, neuron_config=NeuronConfig(output_all_logits=True), **options
    )


def check(ours: NeuronAutoModelForCausalLM, adapted: Any, plain: Any) -> None:
    """Holds logits to be PEFT's, and those to be others than the base model's."""
    ids = np.random.default_rng(0).integers(0, ours.settings.vocab_size, (1, 24))
    expected = tiny.logits(adapted, ids)
    scale = float(np.abs(expected).max())
    assert np.abs(expected - tiny.logits(plain, ids)).max() > 0.05 * scale
    np.testing.assert_allclose(ours(ids), expected, rtol=0, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in ALWAYS else pytest.mark.slow) for c in CASES])
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base = random_model(name, OPTIONS[name][0])
    base.save_pretrained(tmp_path / "base")
    adapted = trained(base, tmp_path / "adapter", **options)
    ours = load(tmp_path / "base", adapter=tmp_path / "adapter")
    check(ours, adapted, base)
    written = open_checkpoint(ours.save_pretrained(tmp_path / "merged"))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    assert written.names() == theirs.names()
    for tensor in written.names():
        np.testing.assert_allclose(written.read(tensor), theirs.read(tensor), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `base`, and one with an adapter of it, `adapter`."""
    folder, model = tmp_path_factory.mktemp("llama"), tiny.model("llama")
    model.save_pretrained(folder / "base")
    trained(model, folder / "adapter", target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=12)
    return folder


def test_sums_are_float32_before_they_are_cast(llama: Path, tmp_path: Path) -> None:
    model = load(llama / "base", adapter=llama / "adapter", amp="bf16")
    written = open_checkpoint(model.save_pretrained(tmp_path / "merged"))
    exact = load(llama / "base", adapter=llama / "adapter").save_pretrained(tmp_path / "exact")
    for name, array in load_file(exact / "model.safetensors").items():
        np.testing.assert_array_equal(written.read(name), array.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        dict(neuron_config=NeuronConfig(output_all_logits=True, quant=QuantizationConfig(quant_dtype="s8"))),
        pytest.param(dict(backend="host", tp_degree=2), marks=pytest.mark.slow),
    ],
    ids=["int8", "two cores"],
)
def test_a_merged_model_is_one_like_any(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    merged = load(llama / "base", adapter=llama / "adapter").save_pretrained(tmp_path / "merged")
    ids = tiny.prompts(1, 12)
    options = dict(n_positions=32) | options
    one, other = (
        NeuronAutoModelForCausalLM.from_pretrained(folder, adapter=adapter, **options)
        for folder, adapter in ((llama / "base", llama / "adapter"), (merged, None))
    )
    np.testing.assert_array_equal(one(ids), other(ids))


@pytest.mark.slow
def test_an_adapter_of_a_multimodal_model(tmp_path: Path) -> None:
    base = multimodal("mistral3")
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=r".*language_model.*\.(q_proj|up_proj)")
    with pytest.warns(UserWarning, match="text model"):
        ours = load(tmp_path / "base", adapter=tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = np.random.default_rng(0).integers(0, 101, (1, 24))
    np.testing.assert_allclose(ours(ids), tiny.logits(adapted, ids), rtol=0, atol=1e-4)


def test_weights_of_torch(llama: Path, tmp_path: Path) -> None:
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(adapter / WEIGHTS).items()}
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    ids = tiny.prompts(1, 12)
    expected = load(llama / "base", adapter=llama / "adapter")(ids)
    np.testing.assert_array_equal(load(llama / "base", adapter=adapter)(ids), expected)


def copied(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in (ADAPTER_CONFIG, WEIGHTS):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return folder


def config(**fields: Any) -> Callable[[Path], None]:
    """Changes fields of adapter_config.json."""

    def change(adapter: Path) -> None:
        path = adapter / ADAPTER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """Changes the names of tensors; a tensor whose name becomes empty is left out."""

    def change(adapter: Path) -> None:
        tensors = {name.replace(old, new): array for name, array in load_file(adapter / WEIGHTS).items()}
        save_file({name: array for name, array in tensors.items() if name}, adapter / WEIGHTS)

    return change


def wider(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    first = next(name for name in tensors if ".q_proj.lora_B" in name)
    save_file(tensors | {first: np.zeros((50, 4), np.float32)}, adapter / WEIGHTS)


def no_weights(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()


def no_tensors(adapter: Path) -> None:
    save_file({}, adapter / WEIGHTS)


def no_config(adapter: Path) -> None:
    (adapter / ADAPTER_CONFIG).unlink()


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "DoRA": (config(use_dora=True), "use_dora=True.*merge_and_unload"),
    "kind": (config(peft_type="LOHA"), "peft_type='LOHA'.*'LORA'"),
    "bias": (config(bias="all"), "bias='all'.*'none'"),
    "modules to save": (config(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "target parameters": (config(target_parameters=["experts.gate_up_proj"]), "target_parameters"),
    "future": (config(use_sparkles={"a": 1}), "use_sparkles"),
    "type": (config(lora_alpha="16"), "lora_alpha is '16'; legal is a valid number"),
    "expression": (config(target_modules="*"), "damaged, or is not what its name says"),
    "rank": (config(r=8), "with r=8"),
    "not selected": (config(target_modules=["v_proj", "down_proj"]), "q_proj, which adapter_config.json"),
    "another layer": (config(layers_to_transform=[1]), "does not select"),
    "no pair": (renamed(f"{Q}.lora_A.weight", ""), "lacks lora_A of model.layers.0.self_attn.q_proj"),
    "name": (renamed("lora_A.weight", "lora_A.default.weight"), "is no lora_A or lora_B"),
    "module": (renamed("layers.1", "layers.7"), "model.layers.7.*another model"),
    "sizes": (wider, r"\[50, 48\].*model.layers.0.self_attn.q_proj.weight.*another model"),
    "no weights": (no_weights, "adapter_model.safetensors, adapter_model.bin"),
    "no tensors": (no_tensors, "holds no tensors"),
    "no config": (no_config, "adapter_config.json: no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, llama: Path, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    change(adapter := copied(llama / "adapter", tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=said):
        load(llama / "base", adapter=adapter)


def test_a_tied_head_has_no_matrix_of_its_own(tmp_path: Path) -> None:
    base = random_model("gemma3_text", OPTIONS["gemma3_text"][0])
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head.*no such matrix of its own"):
        load(tmp_path / "base", adapter=tmp_path / "adapter")


@pytest.mark.slow
def test_a_saved_model_takes_none(llama: Path, tmp_path: Path) -> None:
    model = load(llama / "base", adapter=llama / "adapter", backend="host")
    saved = model.save(tmp_path / "saved", sharded_weights=True)
    ids = tiny.prompts(1, 12)
    alone = NeuronAutoModelForCausalLM.from_pretrained(saved, backend="host")
    np.testing.assert_array_equal(alone.sample(ids, 20, top_k=1), model.sample(ids, 20, top_k=1))
    with pytest.raises(ArtifactError, match="no adapter"):
        load(saved, adapter=llama / "adapter")


def test_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tiny.prompts(1, 12)
    expected = load(llama / "base", adapter=llama / "adapter").sample(ids, 20, top_k=1)[0, 12:].tolist()
    assert expected != load(llama / "base").sample(ids, 20, top_k=1)[0, 12:].tolist()
    prompt = ",".join(map(str, ids[0]))
    capsys.readouterr()
    arguments = ["--ids", prompt, "--max-new-tokens", "8", "--json", "--adapter", str(llama / "adapter")]
    assert run(["sample", str(llama / "base"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected
    arguments = ["--hlo-only", "--no-weights", "--adapter", str(llama / "adapter")]
    assert run(["compile", str(llama / "base"), "-o", str(tmp_path / "out"), *arguments]) == 2
    assert "leave out either" in " ".join(capsys.readouterr().err.split())
    assert run(["sample", str(llama / "adapter"), "--ids", "1"]) == 2
    assert "Name its base model" in " ".join(capsys.readouterr().err.split())
