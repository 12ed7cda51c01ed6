"""Runs NEFFs on NeuronCores through torch-neuronx's public classes, as transformers-neuronx does:
https://github.com/aws-neuron/transformers-neuronx/blob/main/src/transformers_neuronx/compiler.py
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.compiler.neuronx_cc import INSTALL
from jx_neuron.errors import CompilerError, ConfigError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.lowering.verify.rules import TARGETS
from jx_neuron.runtime.bundle import Bundle, Joined
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput
from jx_neuron.util.progress import track

DEVICES = Path("/dev")
PRODUCT = Path("/sys/class/dmi/id/product_name")  # holds the type of an EC2 instance
IO_RING_CACHE = "NEURON_RT_IO_RING_CACHE_SIZE"
VIEWED = {"bfloat16": (np.int16, "bfloat16"), "float8_e4m3": (np.int8, "float8_e4m3fn")}
"""Dtypes that torch.from_numpy does not take: integers of their size, and torch's name. It has no float8_e4m3, whose
numbers have the same bits in float8_e4m3fn."""
FIRST_RANK = 1  # argument of _parallel_executor_run: the number of ranks whose outputs are copied to the host


LIBRARY = "JX_NEURON_RUNTIME"  # names one of LIBRARIES
LIBRARIES = {"torch-neuronx": "torch_neuronx", "nrtpy": "nrtpy"}
NATIVE = (2, 10)
"""From this version on, torch-neuronx is PyTorch's backend for Trainium 2 and 3, without the classes used here."""


def library() -> str | None:
    """The library that runs NEFFs: what JX_NEURON_RUNTIME names, or one that is installed, or None.

    Of both, torch-neuronx, unless it is PyTorch's backend. Imports neither. Raises ConfigError for another name.
    """
    if (named := os.environ.get(LIBRARY)) is not None:
        if named not in LIBRARIES:
            raise ConfigError(f"{LIBRARY}={named!r} is not legal; it may be {' or '.join(LIBRARIES)}")
        return named
    installed = [name for name, module in LIBRARIES.items() if util.find_spec(module) is not None]
    if len(installed) == len(LIBRARIES):
        return "nrtpy" if _is_native() else "torch-neuronx"
    return installed[0] if installed else None


def _is_native() -> bool:
    try:
        major, minor = metadata.version("torch-neuronx").split(".")[:2]
        return (int(major), int(minor)) >= NATIVE
    except (metadata.PackageNotFoundError, ValueError):
        return False


def available() -> bool:
    """Whether a library that runs NEFFs is installed, and a Neuron device exists."""
    return library() is not None and any(DEVICES.glob("neuron[0-9]*"))


def target() -> str | None:
    """neuronx-cc's target for this machine; None where it is no Neuron instance."""
    family = PRODUCT.read_text().strip().partition(".")[0] if PRODUCT.is_file() else ""
    return family if family in TARGETS else None


class NeuronRuntime:
    """Holds parameters and state on NeuronCores, shared by all programs. A program is loaded at its first use.

    Raises CompilerError where torch-neuronx is not installed.
    """

    def __init__(self, bundle: Bundle):
        self._torch, self._bundle, self._runs = _torch(), bundle, 0
        self._torch.ops.neuron._init_neuron()
        self._executors: dict[str, Any] = {}
        self._buffers: dict[tuple[str, tuple[int, ...], str], Any] = {}
        tp = bundle.tp_degree
        params = bundle.of_kind("param")
        self._held = {
            tensor.name: self._put(bundle.parameters[tensor.name])
            for tensor in track(params, "placing weights", len(params))
        }
        self._rank = self._put([np.array([rank], np.int32) for rank in range(tp)])

    @property
    def programs(self) -> frozenset[ProgramKey]:
        return frozenset(self._bundle.programs)

    def load(self, programs: Iterable[ProgramKey]) -> None:
        missing = [spec for spec in map(self._bundle.find, programs) if spec.name not in self._executors]
        for program in track(missing, "loading programs", len(missing)):
            self._executor(program)

    def loaded(self, program: ProgramKey) -> bool:
        return self._bundle.find(program).name in self._executors

    def run(self, step: StepInput) -> StepOutput:
        program = self._bundle.find(step.key)
        executor = self._executor(program)
        inputs = [
            self._host_tensor(np.asarray(step.arrays[t.name], t.dtype)) for t in program.inputs if t.kind == "input"
        ]
        (token,) = self._torch.ops.neuron._parallel_executor_run(executor, inputs, FIRST_RANK)
        self._runs += 1
        first = token if isinstance(token, self._torch.Tensor) else token[0]  # newer torch-neuronx: ranks joined
        logits = outputs_beside_state(program)[1]

        def ranks() -> list[np.ndarray]:
            return [rank.numpy() for rank in self._read(self._device_tensor(logits))]

        return StepOutput(first.numpy(), Logits(ranks, logits.split_axis, lambda: self._runs))

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        """Copies through the host, as transformers-neuronx broadcasts its KV cache."""
        source, target = (self._torch.from_numpy(np.asarray(slots, np.int64)) for slots in (source_n, target_n))
        self._rewrite(lambda rank: rank.index_copy(0, target, rank.index_select(0, source)))

    def clear(self, slot_n: np.ndarray) -> None:
        slots = self._torch.from_numpy(np.asarray(slot_n, np.int64))
        self._rewrite(lambda rank: rank.index_fill(0, slots, 0))

    def reset(self, slots: int, positions: int) -> None:
        """Does nothing: the table keeps its memory: attention masks positions that are not written yet, and what has
        none begins at zeros."""

    def _rewrite(self, change: Callable[[Any], Any]) -> None:
        def changed(rank: Any) -> Any:
            if rank.element_size() > 1:
                return change(rank)
            return change(rank.view(self._torch.int8)).view(rank.dtype)  # torch copies and fills no 8-bit floats

        for tensor in self._bundle.of_kind("state"):
            buffer = self._device_tensor(tensor)
            self._torch.ops.neuron._parallel_write_neuron(buffer, [changed(rank) for rank in self._read(buffer)])

    def _executor(self, program: ProgramSpec) -> Any:
        if program.name not in self._executors:
            classes, tp = self._torch.classes.neuron, self._bundle.tp_degree
            model = classes.ParallelModel(self._bundle.require_neff(program.name), tp, 0, tp)
            with one_set_of_weights():
                model.load()
            inputs, outputs = self._tensor_set("input", program.inputs), self._tensor_set("output", program.outputs)
            input_tensors = [self._device_tensor(tensor) for tensor in program.inputs if tensor.kind == "input"]
            token, _ = outputs_beside_state(program)
            self._executors[program.name] = classes.ParallelExecutor(
                model, inputs, outputs, input_tensors, [self._device_tensor(token)]
            )
        return self._executors[program.name]

    def _tensor_set(self, prefix: str, tensors: Sequence[TensorSpec]) -> Any:
        names = [f"{prefix}{number}" for number in range(len(tensors))]
        tensor_set = self._torch.classes.neuron.ParallelTensorSet(names, self._bundle.tp_degree)
        tensor_set.init()
        for number, tensor in enumerate(tensors):
            tensor_set.add(number, self._device_tensor(tensor))
        return tensor_set

    def _device_tensor(self, tensor: TensorSpec) -> Any:
        """The device tensor of an input or output. All programs share it, and outputs alias the state's memory."""
        if tensor.kind == "rank":
            return self._rank
        if tensor.name in self._held:
            return self._held[tensor.name]
        return self._buffer(tensor.name, tensor.shape, tensor.dtype)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        key = (name, shape, dtype)
        if key not in self._buffers:
            self._buffers[key] = self._put([np.zeros(shape, dtype)] * self._bundle.tp_degree)
        return self._buffers[key]

    def _read(self, tensor: Any) -> list[Any]:
        ranks: list[Any] = self._torch.ops.neuron._parallel_from_neuron(tensor)
        return ranks

    def _put(self, ranks: Sequence[np.ndarray]) -> Any:
        return self._torch.ops.neuron._parallel_to_neuron([self._host_tensor(array) for array in ranks])

    def _host_tensor(self, array: np.ndarray) -> Any:
        array = np.require(array, requirements=["C", "W"])
        if array.dtype.name not in VIEWED:
            return self._torch.from_numpy(array)
        integer, name = VIEWED[array.dtype.name]
        return self._torch.from_numpy(array.view(integer)).view(getattr(self._torch, name))


class Logits:
    """Logits on the NeuronCores of this process, joined from all of them when read. The next run overwrites them.

    ranks: reads each core's part; the whole where `axis` is None.
    runs:  how many runs there were.
    """

    def __init__(self, ranks: Callable[[], list[np.ndarray]], axis: int | None, runs: Callable[[], int]):
        self.axis = axis
        self._ranks, self._runs, self._made_by = ranks, runs, runs()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._runs() != self._made_by:
            raise RuntimeError("these logits were overwritten by a later run; read them before the next one")
        return np.asarray(Joined(self._ranks(), self.axis), dtype)


def outputs_beside_state(program: ProgramSpec) -> tuple[TensorSpec, TensorSpec]:
    """A program's outputs besides the state: tokens and logits."""
    token, logits = (tensor for tensor in program.outputs if tensor.kind == "output")
    return token, logits


def _torch() -> Any:
    try:
        import torch
        import torch_neuronx  # noqa: F401  (registers torch.ops.neuron and torch.classes.neuron)
    except ImportError as error:
        raise CompilerError(
            f"torch-neuronx, AWS's runtime for NeuronCores, cannot be imported ({error}). It comes from AWS's Neuron "
            f"repository: {INSTALL}. Without NeuronCores, use backend='host' or 'xla'"
        ) from error
    return torch


@contextmanager
def one_set_of_weights() -> Iterator[None]:
    """Makes the Neuron runtime keep DMA descriptors of one set of tensors, unless the user has set the variable."""
    is_unset = IO_RING_CACHE not in os.environ
    if is_unset:
        os.environ[IO_RING_CACHE] = "1"
    try:
        yield
    finally:
        if is_unset:
            del os.environ[IO_RING_CACHE]
