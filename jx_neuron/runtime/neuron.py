"""Runs NEFFs on NeuronCores through torch-neuronx's public classes.

They are used as transformers-neuronx uses them:
https://github.com/aws-neuron/transformers-neuronx/blob/main/src/transformers_neuronx/compiler.py
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.compiler.neuronx_cc import INSTALL
from jx_neuron.errors import CompilerError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.lowering.verify.rules import TARGETS
from jx_neuron.runtime import Result
from jx_neuron.runtime.bundle import Bundle, Joined
from jx_neuron.step.shape import Shape
from jx_neuron.util.progress import track

DEVICES = Path("/dev")
PRODUCT = Path("/sys/class/dmi/id/product_name")  # of an EC2 instance, its type
IO_RING_CACHE = "NEURON_RT_IO_RING_CACHE_SIZE"
FIRST_RANK = 1  # of _parallel_executor_run: how many ranks' outputs to copy to the host


def available() -> bool:
    """Whether torch-neuronx is installed and a Neuron device is there; imports neither it nor torch."""
    return importlib.util.find_spec("torch_neuronx") is not None and any(DEVICES.glob("neuron[0-9]*"))


def target() -> str | None:
    """neuronx-cc's target for this machine, or None where it is no Neuron instance."""
    family = PRODUCT.read_text().strip().partition(".")[0] if PRODUCT.is_file() else ""
    return family if family in TARGETS else None


class NeuronRuntime:
    """Holds weights and cache on NeuronCores, shared by all programs; programs are loaded when first needed.

    Raises CompilerError where torch-neuronx is not installed.
    """

    def __init__(self, bundle: Bundle):
        self._torch, self._bundle, self._runs, self._rows = _torch(), bundle, 0, 0
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
    def candidates(self) -> int:
        return self._bundle.candidates

    def run(self, shape: Shape, inputs: Mapping[str, Any]) -> Result:
        program = self._bundle.find(shape)
        executor = self._executor(program)
        given = [self._host_tensor(np.asarray(inputs[t.name], t.dtype)) for t in program.inputs if t.kind == "input"]
        (token,) = self._torch.ops.neuron._parallel_executor_run(executor, given, FIRST_RANK)
        self._runs, self._rows = self._runs + 1, shape.batch
        first = token if isinstance(token, self._torch.Tensor) else token[0]  # newer torch-neuronx: ranks joined
        return Result(first.numpy(), _Logits(self, _outputs(program)[1]))

    def reset(self, slots: int = 0) -> None:
        """The cache keeps its memory; positions yet to be written are masked."""

    def keep(self) -> Any:
        """The cache as each rank's arrays on the host, by name."""
        return {tensor.name: self._read(self._cache(tensor, self._rows)) for tensor in self._bundle.of_kind("state")}

    def restore(self, kept: Any) -> None:
        for tensor in self._bundle.of_kind("state"):
            self._torch.ops.neuron._parallel_write_neuron(
                self._cache(tensor, len(kept[tensor.name][0])), kept[tensor.name]
            )
        self._rows = len(next(iter(kept.values()))[0])

    def clear(self) -> None:
        caches = {tensor.name for tensor in self._bundle.of_kind("state")}
        for (name, shape, dtype), buffer in self._buffers.items():
            if name in caches:
                zeros = [self._host_tensor(np.zeros(shape, dtype)) for _ in range(self._bundle.tp_degree)]
                self._torch.ops.neuron._parallel_write_neuron(buffer, zeros)

    def reorder(self, index_b: np.ndarray, kept: Any = None) -> None:
        """Through the host, as transformers-neuronx broadcasts its cache."""
        if kept is None and np.array_equal(index_b, np.arange(self._rows)):
            return
        index = self._torch.from_numpy(np.asarray(index_b, np.int64))
        kept = self.keep() if kept is None else kept
        for tensor in self._bundle.of_kind("state"):
            rows = [rank.index_select(0, index) for rank in kept[tensor.name]]
            self._torch.ops.neuron._parallel_write_neuron(self._cache(tensor, len(index)), rows)
        self._rows = len(index)

    def compile(self, shapes: Sequence[Shape]) -> None:
        wanted = [of for of in map(self._bundle.find, shapes) if of.name not in self._executors]
        for program in track(wanted, "loading programs", len(wanted)):
            self._executor(program)

    def _executor(self, program: ProgramSpec) -> Any:
        if program.name not in self._executors:
            classes, tp = self._torch.classes.neuron, self._bundle.tp_degree
            neff = self._bundle.neff(program.name)
            if neff is None:
                raise CompilerError(f"the program {program.name} has no NEFF; compile the model with neuronx-cc first")
            model = classes.ParallelModel(neff, tp, 0, tp)
            with _one_set_of_weights():
                model.load()
            inputs, outputs = self._tensor_set("input", program.inputs), self._tensor_set("output", program.outputs)
            given = [self._device_tensor(tensor) for tensor in program.inputs if tensor.kind == "input"]
            token, _ = _outputs(program)
            self._executors[program.name] = classes.ParallelExecutor(
                model, inputs, outputs, given, [self._device_tensor(token)]
            )
        return self._executors[program.name]

    def _tensor_set(self, prefix: str, tensors: Sequence[TensorSpec]) -> Any:
        names = [f"{prefix}{number}" for number in range(len(tensors))]
        found = self._torch.classes.neuron.ParallelTensorSet(names, self._bundle.tp_degree)
        found.init()
        for number, tensor in enumerate(tensors):
            found.add(number, self._device_tensor(tensor))
        return found

    def _device_tensor(self, tensor: TensorSpec) -> Any:
        """What a program reads or writes: its outputs take the cache's memory; programs of a batch share it."""
        if tensor.kind == "rank":
            return self._rank
        if tensor.name in self._held:
            return self._held[tensor.name]
        return self._buffer(tensor.name, tensor.shape, tensor.dtype)

    def _cache(self, tensor: TensorSpec, rows: int) -> Any:
        return self._buffer(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype)

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
        if array.dtype.name == "bfloat16":  # which torch does not take from numpy
            return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)


class _Logits:
    """Logits on the NeuronCores, read from all of them when asked for; the next run overwrites them."""

    def __init__(self, runtime: NeuronRuntime, tensor: TensorSpec):
        self._runtime, self._tensor, self._made_by = runtime, tensor, runtime._runs

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        runtime = self._runtime
        if runtime._runs != self._made_by:
            raise RuntimeError("these logits were overwritten by a later run; read them before the next one")
        ranks = runtime._read(runtime._device_tensor(self._tensor))
        joined = Joined([rank.numpy() for rank in ranks], self._tensor.split_axis)
        return np.asarray(joined, dtype)


def _outputs(program: ProgramSpec) -> tuple[TensorSpec, TensorSpec]:
    """Tokens and logits: what a program gives beside the cache."""
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
def _one_set_of_weights() -> Iterator[None]:
    """Has the runtime keep its descriptors of one set of tensors, where the user has not chosen otherwise."""
    ours = IO_RING_CACHE not in os.environ
    if ours:
        os.environ[IO_RING_CACHE] = "1"
    try:
        yield
    finally:
        if ours:
            del os.environ[IO_RING_CACHE]
