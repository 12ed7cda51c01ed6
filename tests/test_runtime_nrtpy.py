"""The Neuron runtime through nrtpy: the tokens of other backends, one set of tensors a core, and a strict stand-in."""

import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import compiling
import numpy as np
import pytest
import tiny
from compiling import opened
from doubles import nrtpy, torch_neuronx
from doubles.nrtpy import Device, NrtError

from jx_neuron import NeuronConfig
from jx_neuron.config import KVCacheQuantizationConfig
from jx_neuron.errors import CompilerError, ConfigError
from jx_neuron.lowering.hlo import proto
from jx_neuron.runtime import neuron
from jx_neuron.runtime.nrtpy import NrtpyRuntime
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput

IDS = tiny.prompts(2, 13)
DECODE = ProgramKey("decode", 2, 1, 32, 64)
log = compiling.log


@pytest.fixture
def device(log: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    return nrtpy.install(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("llama"))


def test_a_checkpoint_compiled_gives_the_tokens_of_hf(checkpoint: Path, device: Device) -> None:
    model = opened(checkpoint).to_neuron()
    assert isinstance(model.runtime, NrtpyRuntime)
    np.testing.assert_array_equal(model.sample(IDS, 32, top_k=1), tiny.greedy(tiny.model("llama"), IDS, 32))
    assert set(device.reads) == {(0, 2 * 4)}  # two rows' tokens of the first rank, and no logits


@pytest.mark.slow
@pytest.mark.parametrize(("amp", "tp"), [("f32", 2), ("bf16", 1), ("f16", 8)])
def test_a_checkpoint_compiled_and_sampled_gives_the_tokens_of_the_host(
    amp: str, tp: int, checkpoint: Path, device: Device
) -> None:
    model, host = (opened(checkpoint, backend, amp=amp, tp_degree=tp) for backend in ("neuron", "host"))
    model.to_neuron()
    assert isinstance(model.runtime, NrtpyRuntime)
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == ",".join(map(str, range(tp)))
    assert ("NEURON_RT_ROOT_COMM_ID" in os.environ) == (tp > 1)
    for how in (dict(top_k=1), dict(top_k=30, top_p=0.95, temperature=1.2, seed=3)):
        np.testing.assert_array_equal(model.sample(IDS, 32, **how), host.sample(IDS, 32, **how))
    assert set(device.reads) == {(0, 2 * 4)}  # two rows' tokens of the first rank, and no logits
    assert len(device.models) == tp * len(model.settings.programs)
    np.testing.assert_allclose(model(IDS), host(IDS), atol=1e-6)
    assert {core for core, _ in device.reads[-tp:]} == set(range(tp))
    for tensor in model.lowered().programs[DECODE].inputs:
        made = [t.core for t in device.tensors if t.name == tensor.name and t.shape == tensor.shape]
        assert made == list(range(tp)), tensor.name  # once a core


def test_programs_have_no_integers_of_64_bits(checkpoint: Path) -> None:
    """SDK 2.33 may no longer narrow them."""
    programs = opened(checkpoint, "host").lowered()
    for name in (program.name for program in programs.programs.values()):
        module = proto.parse(programs.hlo(name))
        shapes = [leaf for i in proto.instructions(module) for leaf in proto.leaves(i.shape)]
        assert len(shapes) > 100
        assert not {"int64", "uint64"} & {proto.dtype(shape) for shape in shapes}, name


@pytest.mark.slow
def test_slots_are_copied_and_cleared(checkpoint: Path, device: Device) -> None:
    config = NeuronConfig(kv_cache_quant=KVCacheQuantizationConfig("s8"))
    model = opened(checkpoint, neuron_config=config)
    model.sample(IDS, 20, top_k=1)
    names = {tensor.name for tensor in model.lowered().programs[DECODE].inputs if tensor.kind == "state"}
    tables = [tensor for tensor in device.tensors if tensor.name in names]
    before = [np.array(tensor.array) for tensor in tables]
    model.runtime.copy(np.array([1]), np.array([0]))
    for tensor, was in zip(tables, before, strict=True):
        np.testing.assert_array_equal(tensor.array, was[[1, 1]])
    model.runtime.clear(np.array([1]))
    for tensor, was in zip(tables, before, strict=True):
        np.testing.assert_array_equal(tensor.array[0], was[1])
        assert not tensor.array[1].any()


@pytest.mark.slow
def test_logits_are_read_before_they_are_overwritten(checkpoint: Path, device: Device) -> None:
    model = opened(checkpoint)
    model.sample(IDS, 14, top_k=1)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in DECODE.inputs().items()}
    step = StepInput(DECODE, arrays | dict(temperature_b=np.ones(2, np.float32)))
    first = model.runtime.run(step)
    assert np.asarray(first.logits).shape == (2, tiny.VOCAB + 1)
    model.runtime.run(step)
    with pytest.raises(RuntimeError, match="overwritten by a later run"):
        np.asarray(first.logits)


@pytest.mark.slow
def test_an_error_of_a_rank_is_raised(checkpoint: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(checkpoint).to_neuron()

    def fails(placed: list) -> None:
        raise NrtError("hardware error")

    for loaded in device.models:
        monkeypatch.setattr(loaded.group.executable, "execute", fails)
    with pytest.raises(NrtError, match="hardware error"):
        model.sample(IDS, 20, top_k=1)


@pytest.mark.slow
def test_a_neff_of_another_program_is_refused(checkpoint: Path, device: Device) -> None:
    model = opened(checkpoint).cpu_compile()
    programs = model.lowered()
    names = list(programs.neffs)
    programs.neffs = {name: programs.neffs[other] for name, other in zip(names, reversed(names), strict=True)}
    with pytest.raises(CompilerError, match=r"the NEFF of .* has other inputs than its program, such as input\d+"):
        model.to_neuron()


def test_what_runs_neffs_is_chosen(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron, "DEVICES", tmp_path)
    assert neuron.library() == "nrtpy"
    assert not neuron.available()
    (tmp_path / "neuron0").touch()
    assert neuron.available()
    torch_neuronx.install(monkeypatch)
    assert neuron.library() == "torch-neuronx"
    for version, expected in (("2.9.0.2.15", "torch-neuronx"), ("2.13.3", "nrtpy"), ("x", "torch-neuronx")):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert neuron.library() == expected
    for name in ("nrtpy", "torch-neuronx"):
        monkeypatch.setenv("JX_NEURON_RUNTIME", name)
        assert neuron.library() == name
    monkeypatch.setenv("JX_NEURON_RUNTIME", "nrt")
    with pytest.raises(ConfigError, match=r"JX_NEURON_RUNTIME='nrt'.*torch-neuronx or nrtpy"):
        neuron.library()


@pytest.mark.slow
def test_an_empty_package_of_its_name_is_not_nrtpy(
    checkpoint: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nrtpy", ModuleType("nrtpy"))
    monkeypatch.setenv("JX_NEURON_RUNTIME", "nrtpy")
    with pytest.raises(CompilerError, match=r"nrtpy.*cannot be imported.*pip install nrtpy --extra-index-url"):
        opened(checkpoint).to_neuron()


@pytest.mark.slow
def test_the_stand_in_is_strict(checkpoint: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(checkpoint).to_neuron()
    runtime, program = model.runtime, model.lowered().programs[DECODE]
    ours = runtime._models[program.name][0]
    inputs, outputs = (runtime._tensors(*what) for what in (("input", program.inputs), ("output", program.outputs)))
    state = next(n for n, tensor in enumerate(program.outputs) if tensor.kind == "state")
    fresh = dict(outputs[0]) | {f"output{state}": nrtpy.Tensor(device, outputs[0][f"output{state}"].array, None, 0)}
    swapped = dict(zip(inputs[0], [*list(inputs[0].values())[1::-1], *list(inputs[0].values())[2:]], strict=True))
    token = inputs[0]["input0"]
    monkeypatch.setattr(nrtpy, "PATIENCE", 0.1)
    path = Path("no")
    mistakes = [
        (lambda: ours(inputs[0], fresh), "and must be input"),
        (lambda: ours(inputs[1], outputs[1]), "is on core 1"),
        (lambda: ours(swapped, outputs[0]), "input0 is"),
        (lambda: ours(inputs[0]), "alias no state"),
        (lambda: ours(inputs[0], dict(list(outputs[0].items())[:-1])), "other outputs"),
        (lambda: np.asarray(token), "read with numpy"),
        (lambda: nrtpy.Tensor(device, np.zeros(2, np.int64), None, 0), "known dtype"),
        (lambda: nrtpy.Tensor(device, np.zeros(2, np.int32), None, 2), "core 2 of 2"),
        (lambda: device.load(path, core_id=0, world_size=2), "needs collectives"),
        (lambda: ours(inputs[0], outputs[0]), "waited for others"),
    ]
    for make, message in mistakes:
        with pytest.raises(NrtError, match=message):
            make()
    with pytest.raises(ValueError, match="bytes written"):
        token.write_from_numpy(np.zeros(99, token.dtype))
    with pytest.raises(RuntimeError, match="active"):
        device.configure([0])
