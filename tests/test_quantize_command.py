"""Checkpoints that `jx-neuron quantize` writes, as the format's library, Hugging Face transformers and this package
read them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from test_multimodal import WRAPPERS
from test_multimodal import random_model as multimodal_model

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.checkpoint import open_checkpoint
from jx_neuron.cli.app import run
from jx_neuron.llm import quantizing

IDS = tiny.prompts(2, 12)
FORMS = {"int8": [], "fp8": [], "int4": ["--group-size", "16"]}
FARTHEST = {"int8": 0.04, "fp8": 0.15, "int4": 0.4}  # of logits from those in float32, over their spread
MATRICES = 2 * 7


def llama(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, vocab_size=tiny.VOCAB, max_position_embeddings=tiny.POSITIONS)
    config = transformers.LlamaConfig(**(tiny.SPECIAL | sizes | more | options))
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def of(form: str) -> Path:
        if form not in folders:
            folder = tmp_path_factory.mktemp("quantized") / form
            assert run(["quantize", str(source), "-o", str(folder), "--quant", form, *FORMS[form]]) == 0
            folders[form] = folder
        return folders[form]

    return of


def decompressed(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of each quantized matrix."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors, wide = load_file(folder / file), {}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        parts = {key.removeprefix(f"{module}."): tensors[key] for key in tensors if key.startswith(f"{module}.weight")}
        wide[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return wide


def ours(folder: Path) -> np.ndarray:
    model = NeuronAutoModelForCausalLM.from_pretrained(
        folder, batch_size=2, n_positions=16, neuron_config=NeuronConfig(output_all_logits=True)
    )
    return np.asarray(model(IDS))


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_compressed_tensors(form: str, source: Path, written: Callable[[str], Path]) -> None:
    checkpoint, before = open_checkpoint(written(form)), open_checkpoint(source)
    assert checkpoint.names() == before.names()
    wide = decompressed(written(form))
    assert len(wide) == MATRICES
    for name in before.names():
        if name in wide:
            np.testing.assert_array_equal(checkpoint.read(name), wide[name].numpy())
            step = np.abs(before.read(name)).max() / {"int8": 127, "fp8": 15, "int4": 7}[form]
            assert np.abs(checkpoint.read(name) - before.read(name)).max() <= step
        else:
            np.testing.assert_array_equal(checkpoint.read(name), before.read(name))


@pytest.mark.few(1)
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(form: str, source: Path, written: Callable[[str], Path]) -> None:
    hf = transformers.AutoModelForCausalLM.from_pretrained(written(form)).eval()
    found = ours(written(form))
    np.testing.assert_allclose(found, tiny.logits(hf, IDS), atol=1e-4)
    plain = ours(source)
    assert 0 < (found - plain).std() < FARTHEST[form] * plain.std()


def test_the_tokenizer_and_the_generation_config_come_along(source: Path, written: Callable[[str], Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (written("int8") / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((f / "generation_config.json").read_text()) for f in (source, written("int8")))
    assert after == before


def test_the_named_chat_templates_come_along_and_json_says_what_was_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before"
    shutil.copytree(source, before)
    texts = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tools.jinja": "{{ tools }}"}
    for name, text in texts.items():
        (before / name).parent.mkdir(exist_ok=True)
        (before / name).write_text(text)
    capsys.readouterr()
    assert run(["quantize", str(before), "-o", str(tmp_path / "after"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    files = (tmp_path / "after").glob("*.safetensors")
    nbytes = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    kept = len(open_checkpoint(before).names()) - MATRICES
    assert said == dict(directory=str(tmp_path / "after"), quant="int8", quantized=MATRICES, kept=kept, bytes=nbytes)
    for name, text in texts.items():
        assert (tmp_path / "after" / name).read_text() == text


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_written_again_with_the_same_codes(
    form: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    assert run(["quantize", str(written(form)), "-o", str(tmp_path / "again"), "--quant", form, *FORMS[form]]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (written(form), tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.filterwarnings("ignore:quantization_config quantizes activations")
def test_w8a8_has_the_same_weights_and_transformers_rounds_activations(
    form: str, source: Path, written: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "w8a8"
    assert run(["quantize", str(source), "-o", str(folder), "--quant", form, "--w8a8"]) == 0
    weights, w8a8 = open_checkpoint(written(form)), open_checkpoint(folder)
    assert weights.names() == w8a8.names()
    for name in weights.names():
        np.testing.assert_array_equal(weights.read(name), w8a8.read(name))
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantize).eval()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = ours(folder)
    np.testing.assert_allclose(found, tiny.logits(plain, IDS), atol=1e-4)
    difference = found - tiny.logits(rounded, IDS)
    assert 1e-3 * found.std() < difference.std() < FARTHEST[form] * found.std()


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=tiny.VOCAB)
MIXTURES = {
    "mixtral": dict(intermediate_size=48, num_local_experts=4),
    "qwen3_moe": dict(
        intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=16,
        mlp_only_layers=[0],
    ),
    "deepseek_v2": dict(
        intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f == "int4" else pytest.mark.slow) for f in FORMS])
@pytest.mark.parametrize(
    "name", [name if name == "mixtral" else pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES]
)
def test_experts_are_matrices_of_their_own(name: str, form: str, tmp_path: Path) -> None:
    """transformers stacks the experts of such a checkpoint as it reads it, in the model's dtype."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(tiny.SPECIAL | SIZES | MIXTURES[name]))
    before, after = tmp_path / "before", tmp_path / "after"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(before)
    assert run(["quantize", str(before), "-o", str(after), "--quant", form, *FORMS[form]]) == 0
    experts = [name for name in load_file(after / "model.safetensors") if re.search(r"experts\.\d\..*scale$", name)]
    assert len(experts) % (3 * 4) == 0
    assert experts
    hf = transformers.AutoModelForCausalLM.from_pretrained(after).eval()
    expected = tiny.logits(hf, IDS)
    np.testing.assert_allclose(ours(after), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.few(1)
@pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f == "int4" else pytest.mark.slow) for f in FORMS])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_one_tensor_are_written_as_matrices_of_their_own(name: str, form: str, tmp_path: Path) -> None:
    """As transformers has them in memory, and as it writes them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(tiny.SPECIAL | SIZES | MIXTURES[name]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "apart")
    config.save_pretrained(tmp_path / "stacked")
    save_file(model.state_dict(), tmp_path / "stacked" / "model.safetensors")
    for kind in ("apart", "stacked"):
        folder = tmp_path / f"{kind}-{form}"
        assert run(["quantize", str(tmp_path / kind), "-o", str(folder), "--quant", form, *FORMS[form]]) == 0
    apart, stacked = (load_file(tmp_path / f"{kind}-{form}" / "model.safetensors") for kind in ("apart", "stacked"))
    experts = {key for key in apart if ".experts." in key}
    assert experts == {key for key in stacked if ".experts." in key} > set()
    for key in experts:
        assert torch.equal(apart[key].view(torch.uint8), stacked[key].view(torch.uint8)), key
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"stacked-{form}").eval()
    expected = tiny.logits(hf, IDS)
    np.testing.assert_allclose(ours(tmp_path / f"stacked-{form}"), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is loaded as its text model")
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_of_a_multimodal_model_the_text_model_is_quantized(name: str, form: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    model = multimodal_model(name)
    model.save_pretrained(before)
    (before / "preprocessor_config.json").write_text("{}")
    assert run(["quantize", str(before), "-o", str(after), "--quant", form]) == 0
    assert (after / "preprocessor_config.json").is_file()
    source, written = open_checkpoint(before), open_checkpoint(after)
    coded = {name.removesuffix("_scale") for name in load_file(after / "model.safetensors") if "weight_scale" in name}
    assert all("language_model" in name for name in coded)
    assert len(coded) >= 14
    for tensor in source.names() - coded:
        if ".experts." not in tensor:
            np.testing.assert_array_equal(written.read(tensor), source.read(tensor))
    hf = transformers.AutoModelForImageTextToText.from_pretrained(after).eval()
    hf.set_experts_implementation("eager")  # others take no widths that are odd
    expected = tiny.logits(hf, IDS)
    np.testing.assert_allclose(ours(after), expected, atol=1e-4 * np.abs(expected).max())


def test_half_precision_and_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are of the model's dtype, to which the others would round them."""
    monkeypatch.setattr(quantizing, "SHARD", 30_000)
    llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "before")
    for form, options in FORMS.items():
        folder = tmp_path / form
        assert run(["quantize", str(tmp_path / "before"), "-o", str(folder), "--quant", form, *options]) == 0
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(files) > 1
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        checkpoint = open_checkpoint(folder)
        wide = {name: weight for file in files for name, weight in decompressed(folder, file).items()}
        assert len(wide) == MATRICES
        for name, weight in wide.items():
            assert weight.dtype == torch.bfloat16
            exact = torch.from_numpy(checkpoint.read(name))
            assert torch.equal(exact.bfloat16(), weight)
        assert "lm_head" in json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]


def gpt2(folder: Path) -> None:
    tiny.saved("gpt2", folder)


def granite(folder: Path) -> None:
    config = transformers.GraniteMoeConfig(**(tiny.SPECIAL | SIZES), intermediate_size=32, num_local_experts=2)
    transformers.GraniteMoeForCausalLM(config).save_pretrained(folder)


def not_finite(folder: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)


def plain(folder: Path) -> None:
    llama().save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (gpt2, [], ["transformer.h.0.attn.c_attn.weight of gpt2 is a Conv1D", "into Linear alone", "--quant"]),
        (granite, [], ["block_sparse_moe.input_linear.weight", "'e ([m] + m) d -> e d m'", "Linear"]),
        (not_finite, [], ["model.layers.1.mlp.up_proj.weight holds a NaN"]),
        (plain, ["--quant", "int4", "--group-size", "32"], ["group_size=32", "80 inputs", "divisors of 16"]),
        (plain, ["--quant", "int3"], ["quant='int3'", "int8, fp8, int4"]),
        (plain, ["--quant", "int4", "--group-size", "16", "--w8a8"], ["w8a8", "'int8' or 'fp8', not 'int4'"]),
        (plain, ["--group-size", "16"], ["--group-size goes with --quant int4"]),
        (plain, ["--quant", "int4", "--group-size", "15"], ["group_size=15"]),
        (plain, ["--demo"], ["name one model, or --demo"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_refused(
    make: Callable[[Path], None],
    options: list[str],
    said: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "model")
    capsys.readouterr()
    assert run(["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), *options]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for words in said:
        assert words in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is left behind


def test_a_folder_with_files_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert run(["quantize", str(source), "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
