"""From a checkpoint to tokens through NEFFs, with strict stand-ins for neuronx-cc and for torch-neuronx."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import compiling
import numpy as np
import pytest
import tiny
import torch
from compiling import opened
from doubles import neuronx_cc, torch_neuronx
from doubles.torch_neuronx import DeviceTensor, Neuron, NeuronError, ParallelExecutor, ParallelModel, ParallelTensorSet

from jx_neuron import KVCacheQuantizationConfig, NeuronAutoModelForCausalLM, NeuronConfig
from jx_neuron.errors import ArtifactError, CompilerError, LoweringError
from jx_neuron.runtime import neuron as runtime
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput

IDS = tiny.prompts(2, 13)
DECODE, PREFILL = ProgramKey("decode", 2, 1, 32, 64), ProgramKey("prefill", 2, 32, 32, 64)
log = compiling.log


@pytest.fixture
def neuron(log: Path, monkeypatch: pytest.MonkeyPatch) -> Neuron:
    return torch_neuronx.install(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize(
    ("name", "amp", "tp"),
    [
        pytest.param("gpt2", "f32", 8, marks=pytest.mark.slow),
        pytest.param("gptj", "bf16", 1, marks=pytest.mark.slow),
        ("llama", "f16", 2),
    ],
)
def test_a_checkpoint_compiled_and_sampled_gives_the_tokens_of_xla(
    name: str, amp: str, tp: int, neuron: Neuron, log: Path, tmp_path: Path
) -> None:
    folder = tiny.saved(name, tmp_path / "checkpoint")
    model, xla = (opened(folder, backend, amp=amp, tp_degree=tp) for backend in ("neuron", "xla"))
    model.to_neuron()
    calls = neuronx_cc.invocations(log)
    assert sorted(call["module"] for call in calls) == sorted(key.name for key in model.settings.programs)
    for call in calls:
        assert {"--framework=XLA", "--target=trn1", "--model-type=transformer", "--auto-cast=none"} < set(call["argv"])
    drawn = dict(top_k=30, top_p=0.95, temperature=1.2, seed=3)
    for how in (dict(top_k=1), drawn, drawn | dict(start_ids=[5, 0])):
        # in 16 bits, degrees and backends may round to different tokens
        again = xla if amp == "f32" else model
        np.testing.assert_array_equal(model.sample(IDS, 32, **how), again.sample(IDS, 32, **how))
    assert {(what, ranks) for what, ranks, _ in neuron.reads} == {("executor", 1)}
    assert {size for _, _, size in neuron.reads} == {2 * 4}  # two rows' tokens of four bytes, and no logits
    np.testing.assert_allclose(model(IDS), xla(IDS), atol={"f32": 1e-5, "f16": 0.05, "bf16": 0.3}[amp])
    assert neuron.reads[-1] == ("tensor", tp, 2 * -(-tiny.VOCAB // tp) * tp * 4)
    assert len(neuron.models) == len(model.settings.programs)


@pytest.fixture(scope="module")
def lowered(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model lowered at tp 2, with its weights and no NEFFs."""
    return opened(checkpoint).save(tmp_path_factory.mktemp("saved") / "lowered", sharded_weights=True)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    return tiny.greedy(tiny.model("gpt2"), IDS, 20)


def test_newer_executors_that_join_ranks(lowered: Path, expected: np.ndarray, neuron: Neuron) -> None:
    neuron.joined = True
    np.testing.assert_array_equal(opened(lowered).sample(IDS, 20, top_k=1), expected)


@pytest.fixture
def model(lowered: Path, neuron: Neuron) -> NeuronAutoModelForCausalLM:
    return opened(lowered).to_neuron()


def step(key: ProgramKey, length: int, start: int = 0) -> StepInput:
    arrays = {name: np.ones(shape, dtype) for name, (shape, dtype) in key.inputs().items()}
    arrays["tokens_bt"][:] = 0
    arrays["tokens_bt"][:, :length] = IDS[:, :length]
    for name, value in (("start_b", start), ("length_b", length)):
        arrays[name][:] = value
    if "slot_b" in arrays:
        arrays["slot_b"][:] = [0, 1]
    return StepInput(key, arrays)


def caches(neuron: Neuron) -> list[DeviceTensor]:
    return [t for t in neuron.tensors if t.shape == (2, 2, 32, 12)]


def test_weights_and_cache_are_on_the_cores_once(model: NeuronAutoModelForCausalLM, neuron: Neuron) -> None:
    program = model.lowered().programs[DECODE]
    params = {tensor.name: tensor for tensor in program.inputs if tensor.kind == "param"}
    for tensor in params.values():
        part = model._origin.parameters()[tensor.name][0].tobytes()
        assert sum(part == t.read()[0].tobytes() for t in neuron.tensors) == 1
    held = caches(neuron)
    assert len(held) == 4
    before = len(neuron.tensors)
    model.runtime.run(step(PREFILL, 13))
    assert all(np.abs(array[:, :, :13]).min() > 0 for t in held for array in t.read())  # the same memory, written
    kept = [[array.copy() for array in t.read()] for t in held]
    model.runtime.run(step(DECODE, 1, 13))
    for t, arrays in zip(held, kept, strict=True):
        for now, then in zip(t.read(), arrays, strict=True):
            np.testing.assert_array_equal(now[:, :, :13], then[:, :, :13])
            assert (now[:, :, 13] != then[:, :, 13]).any()
    assert len(neuron.tensors) == before


def test_slots_are_copied_and_cleared(model: NeuronAutoModelForCausalLM, neuron: Neuron) -> None:
    model.runtime.run(step(PREFILL, 13))
    tables = caches(neuron)
    before = [np.stack(t.read()) for t in tables]
    model.runtime.copy(np.array([0, 1]), np.array([1, 0]))
    for t, was in zip(tables, before, strict=True):
        np.testing.assert_array_equal(np.stack(t.read()), was[:, ::-1])
    model.runtime.copy(np.array([1]), np.array([0]))
    for t, was in zip(tables, before, strict=True):
        np.testing.assert_array_equal(np.stack(t.read()), was[:, [0, 0]])
    model.runtime.clear(np.array([1]))
    for t, was in zip(tables, before, strict=True):
        np.testing.assert_array_equal(np.stack(t.read())[:, 0], was[:, 0])
        assert not np.stack(t.read())[:, 1].any()
    assert caches(neuron) == tables


@pytest.mark.few(1)
@pytest.mark.parametrize("quant_dtype", ["s8", pytest.param("f8e4m3fn", marks=pytest.mark.slow)])
def test_stored_keys_and_values_are_copied_and_cleared(checkpoint: Path, neuron: Neuron, quant_dtype: str) -> None:
    config = NeuronConfig(kv_cache_quant=KVCacheQuantizationConfig(quant_dtype))
    model, host = (opened(checkpoint, backend, neuron_config=config) for backend in ("neuron", "host"))
    np.testing.assert_array_equal(model.sample(IDS, 20, top_k=1), host.sample(IDS, 20, top_k=1))
    tables = [t for t in neuron.tensors if t.shape[:3] == (2, 2, 32)]
    assert len(tables) == (8 if quant_dtype == "s8" else 4)
    before = [np.stack(t.read()) for t in tables]
    model.runtime.copy(np.array([1]), np.array([0]))
    for t, was in zip(tables, before, strict=True):
        np.testing.assert_array_equal(np.stack(t.read()), was[:, [1, 1]])
    model.runtime.clear(np.array([1]))
    assert not any(np.stack(t.read())[:, 1].astype(np.float32).any() for t in tables)


def test_one_prompt_has_many_answers(checkpoint: Path, neuron: Neuron) -> None:
    how = dict(batch_size=4, prompt_batch_size=2)
    answers, expected = (opened(checkpoint, b, **how).sample(IDS, 24, top_k=20, seed=2) for b in ("neuron", "xla"))
    assert answers.shape == (4, 24)
    np.testing.assert_array_equal(answers, expected)


def test_logits_are_read_before_they_are_overwritten(model: NeuronAutoModelForCausalLM) -> None:
    first = model.runtime.run(step(PREFILL, 13))
    logits = np.array(first.logits)
    assert logits.shape == (2, tiny.VOCAB + 1)
    np.testing.assert_array_equal(logits.argmax(-1)[:, None], first.token_b1)
    model.runtime.run(step(PREFILL, 12))
    with pytest.raises(RuntimeError, match="overwritten by a later run"):
        np.asarray(first.logits)


def test_saved_neffs_are_not_compiled_again(
    checkpoint: Path, lowered: Path, expected: np.ndarray, neuron: Neuron, log: Path, tmp_path: Path, monkeypatch
) -> None:
    made = opened(checkpoint).load(lowered).cpu_compile()
    count = len(neuronx_cc.invocations(log))
    assert count == len(made.settings.programs)
    made.save(tmp_path / "saved", sharded_weights=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    monkeypatch.setenv("PATH", "")
    loaded = opened(checkpoint).load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.sample(IDS, 20, top_k=1), expected)
    alone = opened(tmp_path / "saved")
    np.testing.assert_array_equal(alone.sample(IDS, 20, top_k=1), expected)
    assert len(neuronx_cc.invocations(log)) == count


def test_what_was_compiled_before_comes_from_the_cache(lowered: Path, neuron: Neuron, log: Path) -> None:
    opened(lowered).to_neuron()
    count = len(neuronx_cc.invocations(log))
    opened(lowered).to_neuron()
    assert len(neuronx_cc.invocations(log)) == count > 0


def test_programs_are_checked_before_they_are_compiled(lowered: Path, log: Path) -> None:
    model = opened(lowered)
    programs = model.lowered()
    real = programs.hlo
    programs.hlo = lambda name: real(name).replace(b"AwsNeuronTopK", b"AwsNeuronTopX")
    with pytest.raises(LoweringError, match=r"refuse the model for trn2:(.|\n)*decode-b2-s32-k64: error NCC_EVRF015"):
        model.cpu_compile("trn2")
    assert not neuronx_cc.invocations(log)


def test_flags_and_machine_choose_the_target(lowered: Path, log: Path, tmp_path: Path, monkeypatch) -> None:
    product = tmp_path / "product"
    monkeypatch.setattr(runtime, "PRODUCT", product)
    product.write_text("trn2.48xlarge\n")
    assert opened(lowered).cpu_compile().lowered().settings.target == "trn2"
    monkeypatch.setenv("NEURON_CC_FLAGS", "--target inf2 -O1")
    assert opened(lowered).cpu_compile().lowered().settings.target == "inf2"
    calls = neuronx_cc.invocations(log)
    targets = [flag for call in calls for flag in call["argv"] if flag.startswith("--target")]
    assert targets == ["--target=trn2"] * 2 + ["--target=inf2"] * 2
    assert "--optlevel=1" in calls[-1]["argv"]
    with pytest.raises(CompilerError, match="NEURON_CC_FLAGS asks for --target=inf2"):
        opened(lowered).cpu_compile("trn1")


def test_neffs_of_another_generation_are_refused(lowered: Path, neuron: Neuron, tmp_path: Path, monkeypatch) -> None:
    folder = opened(lowered).cpu_compile("inf2").save(tmp_path / "saved", sharded_weights=True)
    product = tmp_path / "product"
    monkeypatch.setattr(runtime, "PRODUCT", product)
    product.write_text("trn2.48xlarge\n")
    with pytest.raises(ArtifactError, match="compiled for inf2, and this is a trn2 instance"):
        opened(folder).to_neuron()
    product.write_text("trn1.2xlarge\n")  # of the same generation
    opened(folder).to_neuron()


ADVICE = "pip install neuronx-cc torch-neuronx --extra-index-url https://pip.repos.neuron.amazonaws.com"


def test_without_torch_neuronx_it_says_what_to_install(lowered: Path, log: Path) -> None:
    with pytest.raises(CompilerError, match=re.escape(ADVICE)):
        opened(lowered).to_neuron()


def test_a_neuron_device_makes_it_the_default(neuron: Neuron, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "DEVICES", tmp_path)
    assert not runtime.available()
    (tmp_path / "neuron0").touch()
    assert runtime.available()
    assert opened(checkpoint, backend=None).backend == "neuron"


def bound(model: ParallelModel, inputs: list[DeviceTensor], outputs: list[DeviceTensor]) -> ParallelExecutor:
    sets = []
    for prefix, tensors in (("input", inputs), ("output", outputs)):
        sets.append(ParallelTensorSet([f"{prefix}{n}" for n in range(len(tensors))], 2))
        sets[-1].init()
        for n, tensor in enumerate(tensors):
            sets[-1].add(n, tensor)
    return ParallelExecutor(model, *sets, [], [])


def swapped(tensors: list[DeviceTensor], a: int, b: int) -> list[DeviceTensor]:
    found = list(tensors)
    found[a], found[b] = found[b], found[a]
    return found


def unloaded(model: ParallelModel) -> ParallelModel:
    found = copy.copy(model)
    found.loaded = False
    return found


# what a runtime could do wrong, given the model, its inputs and outputs (tokens, logits, caches) and the machine
MISTAKES: dict[str, tuple[Callable[..., object], str]] = {
    "two inputs swapped": (lambda m, i, o, n: bound(m, swapped(i, 0, 1), o), "input0 is float32"),
    "caches not aliased": (lambda m, i, o, n: bound(m, i, [*o[:2], copy.copy(o[2]), *o[3:]]), "and must be input"),
    "caches swapped": (lambda m, i, o, n: bound(m, i, swapped(o, 2, 3)), "and must be input"),
    "an output missing": (lambda m, i, o, n: bound(m, i, o[:-1]), "other names"),
    "a tensor twice": (lambda m, i, o, n: bound(m, i, o).inputs.add(0, i[0]), "input0 is there already"),
    "no init": (lambda m, i, o, n: ParallelTensorSet(["input0"], 2).add(0, i[0]), "init() was not called"),
    "model not loaded": (lambda m, i, o, n: bound(unloaded(m), i, o), "not loaded"),
    "model loaded twice": (lambda m, i, o, n: m.load(), "loaded already"),
    "read by numpy": (lambda m, i, o, n: np.asarray(i[0]), "_parallel_from_neuron"),
    "an int64 input": (lambda m, i, o, n: n.put([torch.zeros(2, dtype=torch.int64)]), "int64"),
    "more cores than there are": (lambda m, i, o, n: n.put([torch.zeros(2)] * 33), "one tensor a core"),
    "another shape written": (lambda m, i, o, n: n.write(o[2], [torch.zeros(2)] * 2), "written to"),
    "a rank too many read": (lambda m, i, o, n: n.run(bound(m, i, o), [], 3), "return_ranks=3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_is_strict(mistake: str, model: NeuronAutoModelForCausalLM, neuron: Neuron) -> None:
    executor = model.runtime._executors[DECODE.name]
    inputs, outputs = executor.inputs.tensors, executor.outputs.tensors
    make, message = MISTAKES[mistake]
    with pytest.raises(NeuronError, match=re.escape(message)):
        make(executor.model, inputs, outputs, neuron)


def test_the_stand_in_gives_nothing_that_a_failed_run_consumed(model, neuron, monkeypatch) -> None:
    executor = model.runtime._executors[DECODE.name]

    def fails(placed: list) -> None:
        raise NeuronError("hardware error")

    monkeypatch.setattr(executor.model.executable, "execute", fails)
    with pytest.raises(NeuronError, match="hardware error"):
        model.runtime.run(step(DECODE, 1))
    with pytest.raises(NeuronError, match="consumed by a program"):
        neuron.get(executor.outputs.tensors[-1])
