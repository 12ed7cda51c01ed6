"""Runs NEFFs on NeuronCores through nrtpy, the Neuron runtime in Python (SDK 2.32 and later, beta), without PyTorch:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/nrtpy/index.html

A process has one runtime of all its cores. A rank is a core, with tensors, a loaded NEFF and a thread of its own: ranks
meet in collectives, so that all have to be under way at once. Those of several hosts find each other at
NEURON_RT_ROOT_COMM_ID, which is the same on all hosts.
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jx_neuron.compiler.neuronx_cc import REPOSITORY
from jx_neuron.errors import CompilerError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.runtime.bundle import Bundle
from jx_neuron.runtime.neuron import Logits, one_set_of_weights, outputs_beside_state
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput
from jx_neuron.util.progress import track
from jx_neuron.util.temporary import temporary_folder

ROOT_COMM_ID = "NEURON_RT_ROOT_COMM_ID"  # host:port where ranks find each other
VISIBLE_CORES = "NEURON_RT_VISIBLE_CORES"


def rendezvous(ranks: int) -> dict[str, str]:
    """The environment in which the ranks of one host find each other; what the user has set is left out."""
    if ranks == 1 or ROOT_COMM_ID in os.environ:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {ROOT_COMM_ID: f"127.0.0.1:{free.getsockname()[1]}"}


class NrtpyRuntime:
    """Holds parameters and state on NeuronCores, shared by all programs. A program is loaded at its first use.

    Core i of the process is the i-th rank of the bundle. Tokens are the same on all ranks; logits are those of its own.

    Raises CompilerError where nrtpy is not installed.
    """

    def __init__(self, bundle: Bundle):
        self._nrtpy, self._bundle, self._runs = _nrtpy(), bundle, 0
        self._cores = range(len(bundle.ranks))
        os.environ.update(rendezvous(bundle.tp_degree))
        if VISIBLE_CORES not in os.environ:
            self._nrtpy.configure(visible_cores=self._cores)
        self._threads = ThreadPoolExecutor(len(self._cores), "neuron-rank")
        self._models: dict[str, list[Any]] = {}
        self._buffers: dict[tuple[str, tuple[int, ...], str], list[Any]] = {}
        params = bundle.of_kind("param")
        self._held = {
            tensor.name: self._put(tensor.name, bundle.parameters[tensor.name])
            for tensor in track(params, "placing weights", len(params))
        }
        self._rank = self._put("rank", [np.array([rank], np.int32) for rank in bundle.ranks])

    @property
    def programs(self) -> frozenset[ProgramKey]:
        return frozenset(self._bundle.programs)

    def load(self, programs: Iterable[ProgramKey]) -> None:
        missing = [spec for spec in map(self._bundle.find, programs) if spec.name not in self._models]
        for program in track(missing, "loading programs", len(missing)):
            self._model(program)

    def loaded(self, program: ProgramKey) -> bool:
        return self._bundle.find(program).name in self._models

    def run(self, step: StepInput) -> StepOutput:
        program = self._bundle.find(step.key)
        models = self._model(program)
        token, logits = outputs_beside_state(program)
        inputs, outputs = self._tensors("input", program.inputs), self._tensors("output", program.outputs)
        given = {
            f"input{number}": np.asarray(step.arrays[tensor.name], tensor.dtype)
            for number, tensor in enumerate(program.inputs)
            if tensor.kind == "input"
        }

        def run_core(core: int) -> None:
            for name, array in given.items():
                inputs[core][name].write_from_numpy(array)
            models[core](inputs[core], outputs[core])

        self._on_each(run_core)
        self._runs += 1

        def ranks() -> list[np.ndarray]:
            return [rank.numpy() for rank in self._device_tensor(logits)]

        return StepOutput(self._device_tensor(token)[0].numpy(), Logits(ranks, logits.split_axis, lambda: self._runs))

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        """Copies through the host: nrtpy copies nothing from a part of one tensor to another."""

        def copied(array: np.ndarray) -> None:
            array[target_n] = array[source_n]

        self._rewrite(copied)

    def clear(self, slot_n: np.ndarray) -> None:
        def cleared(array: np.ndarray) -> None:
            array[slot_n] = 0

        self._rewrite(cleared)

    def reset(self, slots: int, positions: int) -> None:
        """Does nothing: attention masks positions that are not written yet, and what has none begins at zeros."""

    def _rewrite(self, change: Callable[[np.ndarray], None]) -> None:
        state = [self._device_tensor(tensor) for tensor in self._bundle.of_kind("state")]

        def rewrite_core(core: int) -> None:
            for tensors in state:
                array = np.array(tensors[core].numpy())
                change(array)
                tensors[core].write_from_numpy(array)

        self._on_each(rewrite_core)

    def _on_each(self, run: Callable[[int], Any]) -> list[Any]:
        """Runs a function of the core in each core's thread. All end before the first error is raised."""
        futures = [self._threads.submit(run, core) for core in self._cores]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def _model(self, program: ProgramSpec) -> list[Any]:
        """The program on each core."""
        if program.name not in self._models:
            with temporary_folder() as folder, one_set_of_weights():
                path = folder / f"{program.name}.neff"
                path.write_bytes(self._bundle.require_neff(program.name))
                ranks, count = self._bundle.ranks, self._bundle.tp_degree

                def load_core(core: int) -> Any:
                    return self._nrtpy.NrtpyModel.load_from_neff(
                        path, core_id=core, cc_enabled=count > 1, rank_id=ranks[core], world_size=count
                    )

                models = self._on_each(load_core)
            for prefix, tensors, infos in (
                ("input", program.inputs, models[0].input_tensors_info),
                ("output", program.outputs, models[0].output_tensors_info),
            ):
                _check(program.name, prefix, tensors, infos)
            self._models[program.name] = models
        return self._models[program.name]

    def _tensors(self, prefix: str, tensors: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        """Each core's tensors by their names in the NEFF."""
        placed = [self._device_tensor(tensor) for tensor in tensors]
        return [{f"{prefix}{number}": cores[core] for number, cores in enumerate(placed)} for core in self._cores]

    def _device_tensor(self, tensor: TensorSpec) -> list[Any]:
        """An input or output on each core. All programs share it, and outputs alias the state's memory."""
        if tensor.kind == "rank":
            return self._rank
        if tensor.name in self._held:
            return self._held[tensor.name]
        key = (tensor.name, tensor.shape, tensor.dtype)
        if key not in self._buffers:
            self._buffers[key] = self._put(tensor.name, [np.zeros(tensor.shape, tensor.dtype)] * len(self._cores))
        return self._buffers[key]

    def _put(self, name: str, parts: Sequence[np.ndarray]) -> list[Any]:
        return [
            self._nrtpy.NrtpyTensor.from_numpy(np.ascontiguousarray(array), name=name, core_id=core)
            for core, array in enumerate(parts)
        ]


def _check(name: str, prefix: str, tensors: Sequence[TensorSpec], infos: Mapping[str, Any]) -> None:
    """Raises CompilerError unless a NEFF has the inputs, or outputs, of its program."""
    expected = {
        f"{prefix}{number}": (tensor.shape, np.zeros(tensor.shape, tensor.dtype).nbytes)
        for number, tensor in enumerate(tensors)
    }
    found = {tensor: (tuple(info.shape), info.size) for tensor, info in infos.items()}
    if found != expected:
        differ = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise CompilerError(
            f"the NEFF of {name} has other {prefix}s than its program, such as {differ[0]}: "
            f"{found.get(differ[0])} and not {expected.get(differ[0])}; compile the model again"
        )


def _nrtpy() -> Any:
    try:
        import nrtpy

        _ = nrtpy.NrtpyModel, nrtpy.NrtpyTensor
    except (ImportError, AttributeError) as error:  # PyPI has an empty package of this name
        raise CompilerError(
            f"nrtpy, the Neuron runtime in Python, cannot be imported ({error}). It comes from AWS's Neuron "
            f"repository: pip install nrtpy {REPOSITORY}. Without NeuronCores, use backend='host' or 'xla'"
        ) from error
    return nrtpy
