"""Weights in 8 and 4 bits: what codes and scales are, how they are split, and that every runtime computes the same."""

import functools
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from families import OPTIONS
from transformers import AutoConfig

from jx_neuron import NeuronAutoModelForCausalLM, NeuronConfig, QuantizationConfig, SamplingParams
from jx_neuron.checkpoint import tensor_files
from jx_neuron.checkpoint.folder import open_checkpoint
from jx_neuron.errors import ArtifactError, ConfigError
from jx_neuron.lowering import Program
from jx_neuron.lowering.model import lower_model
from jx_neuron.models import Decoder
from jx_neuron.nn import quantized as quantized_module
from jx_neuron.nn.quantized import Form, Quantized
from jx_neuron.runtime.cpu import codes as cpu
from jx_neuron.runtime.cpu.kernel import Formulation
from jx_neuron.step.program_key import ProgramKey

S8, F8 = QuantizationConfig(), QuantizationConfig(quant_dtype="f8e4m3fn")
INT4 = QuantizationConfig(quant_dtype="int4", group_size=2)
CONFIGS = {"s8": S8, "f8e4m3fn": F8, "int4": INT4}
TARGETS = ("inf2", "trn1", "trn2")
MATRIX = np.random.default_rng(0).standard_normal((64, 5, 6)).astype(np.float32)


def quantized(form: Form, matrix: np.ndarray = MATRIX) -> Quantized:
    return Quantized(form, **{name: jnp.asarray(part) for name, part in form.encode(matrix, np.float32).items()})


@pytest.mark.parametrize(("kind", "most", "dtype"), [("int8", 127, np.int8), ("fp8", 240, ml_dtypes.float8_e4m3)])
def test_codes_and_scales_are_transformers_neuronxs(kind: Any, most: float, dtype: Any) -> None:
    """scale[o] = max |W[:, o]| / most, codes = W / scale, rounded half to even and clamped, or cast."""
    matrix = MATRIX.copy()
    matrix[:, 2, 3] = 0
    matrix[:4, 0, 0] = 127, 0.5, 1.5, -2.5
    matrix[4:, 0, 0] = 0
    parts = Form(kind, 1).encode(matrix, np.float32)
    scales = np.abs(matrix).max(axis=0) / np.float32(most)
    exact = np.divide(matrix, scales, out=np.zeros_like(matrix), where=scales > 0)
    rounded = np.clip(np.round(exact), -128, 127) if kind == "int8" else exact
    np.testing.assert_array_equal(parts["scales"], scales)
    np.testing.assert_array_equal(parts["codes"], rounded.astype(dtype))
    assert parts["scales"].dtype == np.float32
    if kind == "int8":
        assert parts["codes"][:4, 0, 0].tolist() == [127, 0, 2, -2]


def test_int4_is_the_nearest_of_sixteen_numbers_of_a_group() -> None:
    parts = Form("int4", 1, group=8).encode(MATRIX, np.float32)
    pairs = parts["codes"].reshape(4, 8, 5, 6)
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).astype(np.float32)
    scales, offsets = (parts[name].astype(np.float32)[:, None] for name in ("scales", "offsets"))
    decoded = (codes.reshape(8, 8, 5, 6) * scales + offsets).reshape(MATRIX.shape)
    wide = np.asarray(quantized(Form("int4", 1, group=8)).widened(jnp.float32))
    np.testing.assert_array_equal(wide, decoded)
    amax = np.abs(MATRIX).reshape(8, 8, 5, 6).max(1)
    plain = np.clip(np.rint(MATRIX.reshape(8, 8, 5, 6) / (amax / 7)[:, None]), -8, 7) * (amax / 7)[:, None]
    error, of_plain = (np.square(x.reshape(MATRIX.shape) - MATRIX).sum() for x in (decoded, plain))
    assert error < 0.9 * of_plain


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_int4_has_the_very_numbers_of_gguf_blocks(kind: str) -> None:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    matrix = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)
    wide = gguf.dequantize(gguf.quantize(matrix, number), number)
    np.testing.assert_array_equal(quantized(Form("int4", 1, group=32), wide.T).widened(jnp.float32).T, wide)


@pytest.mark.parametrize("result", [None, "float16"])
def test_a_product_is_scaled_in_float32_and_then_rounded(result: str | None) -> None:
    form = Form("int8", 1, result=result)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    parts = form.encode(MATRIX, np.float32)
    (y,) = quantized(form).matmul(jnp.asarray(x))
    expected = np.tensordot(x, parts["codes"].astype(np.float32), 1) * parts["scales"]
    assert y.dtype == (result or "float32")
    np.testing.assert_allclose(np.asarray(y), expected.astype(result or np.float32), rtol=2e-3 if result else 1e-5)


@pytest.mark.few(8)
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("dot", ["eigen", "ynnpack"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_cpu_computes_the_same(kind: Any, dot: Any, rows: int) -> None:
    form, formulation = Form(kind, 1, group=8 if kind == "int4" else 0), Formulation((), 4, dot)
    matrices = MATRIX, MATRIX[:, :3, 2]
    parts = [form.encode(matrix, np.float32) for matrix in matrices]
    arrays = [jnp.asarray(cpu.pack_part([p[name] for p in parts], form, name)) for name in form.parts]
    assert [(a.shape, a.dtype) for a in arrays] == [(s.shape, s.dtype) for s in cpu.shapes((33, 64), form).values()]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 64)), jnp.float32)
    packed = cpu.PackedCodes(
        dict(zip(form.parts, arrays, strict=True)), [matrix.shape for matrix in matrices], form, formulation
    )
    for y, matrix in zip(packed.matmul(x), matrices, strict=True):
        (expected,) = quantized(form, matrix).matmul(x)
        np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=0, atol=1e-3 if rows > 4 else 1e-4)


def decoder(name: str, config: QuantizationConfig | None, tp: int = 2, number: int = 0) -> Decoder:
    raw = AutoConfig.for_model(name, **deepcopy(OPTIONS[name][number])).to_dict()
    return replace(Decoder.from_config(raw, tp), quant=config)


@pytest.mark.parametrize(
    "form",
    [Form("int8", 1), Form("fp8", 2), Form("int8", 2, rows=True), Form("int8", 1, 1), Form("int4", 1, group=8)],
    ids=str,
)
def test_matrices_are_encoded_in_slices(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = form.encode(MATRIX, np.float32)
    monkeypatch.setattr(quantized_module, "SLICE", 64)
    for part, array in form.encode(MATRIX, np.float32).items():
        np.testing.assert_array_equal(array, whole[part], strict=True)


def test_a_table_is_encoded_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny.saved("llama", tmp_path))
    quant = QuantizationConfig(quant_dtype="int4", group_size=6, lm_head=True)
    source = replace(Decoder.from_config(checkpoint.config), quant=quant).source(checkpoint, np.float32)
    whole = {path: source.read(path) for path in source.paths}
    monkeypatch.setattr(tensor_files, "SLICE", 1000)
    monkeypatch.setattr(type(checkpoint), "read", lambda self, name: pytest.fail(f"{name} is read whole"))
    tables = [path for path in source.paths if "embed" in path or "lm_head" in path]
    assert {path.rsplit(".", 1)[1] for path in tables} == {"codes", "scales", "embedding"}
    for path in tables:
        if not path.endswith(".embedding"):
            np.testing.assert_array_equal(source.read(path), whole[path], strict=True)


def test_what_is_quantized() -> None:
    def paths(config: QuantizationConfig, name: str = "mixtral") -> set[str]:
        return {path.removeprefix("layers.0.") for path in decoder(name, config, 1).forms if "layers.1" not in path}

    experts = {f"mlp.experts.{name}_proj.kernel" for name in ("gate", "up", "down")}
    attention = {f"self_attn.{name}_proj.kernel" for name in ("qkv.q", "qkv.k", "qkv.v", "o")}
    assert paths(S8) == experts | attention
    assert paths(QuantizationConfig(quantize_attn=False)) == experts
    assert paths(QuantizationConfig(lm_head=True)) == experts | attention | {"lm_head.embedding"}
    assert paths(QuantizationConfig(keep=["*.experts.*"])) == attention
    forms = decoder("llama", QuantizationConfig(quant_dtype="f8e4m3fn", no_quantize_list=["model.layers.1"])).forms
    assert {path for path, form in forms.items() if form.cast} == {
        f"layers.1.mlp.{name}.kernel" for name in ("gate_up.gate_proj", "gate_up.up_proj", "down_proj")
    }


def test_codes_and_scales_are_split_with_outputs_and_groups() -> None:
    int8, int4 = decoder("llama", S8), decoder("llama", INT4)
    attention, out = "layers.0.self_attn.qkv.q_proj.kernel", "layers.0.self_attn.o_proj.kernel"
    assert tuple(int8.partition(f"{attention}.scales")) == ("tp", None)
    assert "tp" not in tuple(int8.partition(f"{out}.scales"))
    assert tuple(int4.partition(f"{out}.scales")) == tuple(int4.partition(f"{out}.codes")) == ("tp", None, None)


def test_what_is_stored_otherwise_is_said(tmp_path: Path) -> None:
    folder = tiny.saved("llama", tmp_path)

    def notes(tp_degree: int, **options: Any) -> list[str]:
        config = NeuronConfig(quant=QuantizationConfig(**options))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            NeuronAutoModelForCausalLM.from_pretrained(
                folder, n_positions=32, tp_degree=tp_degree, backend="host", neuron_config=config
            )
        return [str(warning.message) for warning in caught if "quantized" in str(warning.message)]

    assert notes(1, lm_head=True) == []
    (wider,) = notes(1, quant_dtype="int4", group_size=512)
    assert "stored in int8, such as layers.0.mlp.down_proj.kernel" in wider
    (head,) = notes(1, lm_head=True, keep=["lm_head.*"])
    assert head.startswith("the head is not quantized")


USUAL = ("deepseek_v3", "llama")
EVERY = [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in OPTIONS]


@pytest.mark.few(4)
@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("name", EVERY)
def test_neuron_takes_it_and_scales_are_no_collective(name: str, form: str) -> None:
    assert decoder(name, CONFIGS[form]).forms
    programs = lowered(name, replace(CONFIGS[form], lm_head=True))
    assert [collectives(program) for program in programs] == plain_collectives(name)
    for program in programs:
        for target in TARGETS:
            assert program.verify(target) == []


def lowered(name: str, quant: QuantizationConfig | None) -> list[Program]:
    keys = [ProgramKey("decode", 2, 1, 64, 16), ProgramKey("prefill", 2, 32, 32, 16)]
    return list(lower_model(decoder(name, quant), keys, 3, 96, jnp.bfloat16))


def collectives(program: Program) -> Counter[tuple[str, str]]:
    return Counter((collective.opcode, collective.shape) for collective in program.collectives())


@functools.cache
def plain_collectives(name: str) -> list[Counter[tuple[str, str]]]:
    return [collectives(program) for program in lowered(name, None)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).save_pretrained(folder)
    return folder


def load(folder: Path, quant: QuantizationConfig | None, **options: Any) -> NeuronAutoModelForCausalLM:
    return NeuronAutoModelForCausalLM.from_pretrained(
        folder, n_positions=32, context_length_estimate=8, neuron_config=NeuronConfig(quant=quant), **options
    )


def greedy(model: NeuronAutoModelForCausalLM) -> list[int]:
    (answer,) = model.generate([[3, 1, 4, 1, 5]], SamplingParams(max_tokens=16, top_k=1, eos_token_id=-1))
    return list(answer.ids)


@pytest.mark.slow
@pytest.mark.parametrize("form", CONFIGS)
def test_every_runtime_and_degree_answers_the_same(form: str, checkpoint: Path) -> None:
    quant = replace(CONFIGS[form], lm_head=True)
    answers = [
        greedy(load(checkpoint, quant, tp_degree=tp, backend=backend))
        for tp, backend in ((1, "xla"), (2, "xla"), (1, "host"), (2, "host"), (4, "host"))
    ]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.few(1)
@pytest.mark.parametrize(("quant", "dtype"), [(S8, "int8"), pytest.param(F8, "float8_e4m3", marks=pytest.mark.slow)])
def test_an_artifact_keeps_codes(quant: QuantizationConfig, dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, quant, tp_degree=2, backend="host")
    saved = NeuronAutoModelForCausalLM.from_pretrained(model.save(tmp_path / "saved", sharded_weights=True))
    assert saved.settings.quant == quant
    assert greedy(saved) == greedy(model)
    dtypes = {name: parts[0].dtype for name, parts in saved._origin.parameters().items() if ".o_proj." in name}
    assert {str(dtype) for dtype in dtypes.values()} == {dtype, "float32"}
    with pytest.raises(ArtifactError, match="quant=QuantizationConfig"):
        load(checkpoint, None, tp_degree=2, backend="host").load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quant_dtype="s4"), "quant_dtype='s4' is not legal; it is 's8' or 'f8e4m3fn' or 'int4'"),
        (dict(dequant_dtype="f64"), "dequant_dtype='f64' is not legal"),
        (dict(quantize_method="direct_cast"), "quantize_method='direct_cast' is not legal with quant_dtype='s8'"),
        (dict(no_quantize_list=["self_attn"]), "goes with quantize_attn=False"),
        (dict(no_quantize_list=["model.layers.0"]), "legal is 'self_attn', and with quant_dtype='f8e4m3fn'"),
        (dict(group_size=32), "goes with quant_dtype='int4'"),
        (dict(quant_dtype="int4", group_size=7), "it is an even number"),
        (dict(keep="layers.0"), "it is a list of strings"),
    ],
)
def test_what_is_not_legal_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig(**options)


def test_layers_and_patterns_that_the_model_does_not_have_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep has '\*\.wo\.\*', which no parameter matches"):
        load(checkpoint, QuantizationConfig(keep=["*.wo.*"]))
    with pytest.raises(ConfigError, match=r"model\.layers\.7, and the model has 2 layers"):
        load(checkpoint, QuantizationConfig(quant_dtype="f8e4m3fn", no_quantize_list=["model.layers.7"]))


def test_a_plan_counts_bytes_as_they_are_stored() -> None:
    from jx_neuron.planning.outline import Outline

    for name, config in (CONFIGS | {"int4": replace(INT4, group_size=8)}).items():
        coded = decoder("llama", replace(config, lm_head=True))
        arrays, partition = coded.abstract_params(jnp.bfloat16), coded.partition
        stored = sum(a.size * a.dtype.itemsize // (2 if "tp" in partition(path) else 1) for path, a in arrays.items())
        outline = Outline.of(coded)
        assert outline.weight_bytes(2, 2) == stored, name
        assert outline.parameter_count == Outline.of(replace(coded, quant=None)).parameter_count
        assert outline.read_bytes(2, 1, 2) < outline.read_elements(2) * 2


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "most"), [("int8", 1.005), ("int4", 1.08)])
def test_what_quantization_costs_in_perplexity(
    quant: str, most: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import json
    import pydoc_data.topics

    from jx_neuron.cli.app import run

    text = tmp_path / "text.txt"
    text.write_text("\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)))
    perplexities = []
    for option in ([], ["--quant", quant]):
        arguments = ["score", "--demo", str(text), "--tokens", "20000", "--n-positions", "512", "--json", *option]
        assert run(arguments) == 0
        perplexities.append(json.loads(capfd.readouterr().out.splitlines()[-1])["perplexity"])
    assert perplexities[1] < most * perplexities[0]


def test_forms_that_do_not_exist_are_refused_on_the_command_line(tmp_path: Path) -> None:
    from jx_neuron.cli.options import neuron_config

    with pytest.raises(ConfigError, match="quant='int3' is not legal; it is one of int8, fp8, int4"):
        neuron_config("int3")
