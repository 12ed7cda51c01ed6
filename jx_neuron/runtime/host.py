"""Runs lowered programs on host devices, one replica a core, without model code and without a chip."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jx_neuron.lowering.execute import Executable
from jx_neuron.lowering.signature import TensorSpec
from jx_neuron.runtime.bundle import Bundle, Joined
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput
from jx_neuron.util.progress import map_concurrently, track


class HostRuntime:
    """Holds each rank's parameters and state on a host device, and runs the very programs that neuronx-cc compiles."""

    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._executables: dict[str, Executable] = {}
        self._first = self._executable(min(bundle.programs))
        params = bundle.of_kind("param")
        self._params = [
            self._first.put(bundle.parameters[tensor.name]) for tensor in track(params, "placing weights", len(params))
        ]
        self._rank = self._first.put([np.array([rank], np.int32) for rank in range(bundle.tp_degree)])
        self._state: list[jax.Array] = []
        self.reset(0, 0)

    @property
    def programs(self) -> frozenset[ProgramKey]:
        return frozenset(self._bundle.programs)

    def load(self, programs: Iterable[ProgramKey]) -> None:
        by_name = {self._bundle.find(key).name: key for key in programs}
        missing = [key for name, key in by_name.items() if name not in self._executables]
        map_concurrently(self._executable, missing, "compiling for the host")

    def loaded(self, program: ProgramKey) -> bool:
        return self._bundle.find(program).name in self._executables

    def run(self, step: StepInput) -> StepOutput:
        program, executable = self._bundle.find(step.key), self._executable(step.key)
        params, state = iter(self._params), iter(self._state)
        arguments = [self._argument(executable, tensor, params, state, step) for tensor in program.inputs]
        outputs = list(zip(program.outputs, executable.execute(arguments), strict=True))
        self._state = [executable.put(ranks) for tensor, ranks in outputs if tensor.kind == "state"]
        (_, tokens), (logits, parts) = (output for output in outputs if output[0].kind == "output")
        return StepOutput(tokens[0], Joined(parts, logits.split_axis))

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        self._state = [self._on_each(_copied, array, source_n, target_n) for array in self._state]

    def clear(self, slot_n: np.ndarray) -> None:
        self._state = [self._on_each(_cleared, array, slot_n) for array in self._state]

    def reset(self, slots: int, positions: int) -> None:
        """Makes a table of the size that the programs were lowered for."""
        devices = self._first.mesh.devices.tolist()
        self._state = [
            self._first.put([jnp.zeros(tensor.shape, tensor.dtype, device=device) for device in devices])
            for tensor in self._bundle.of_kind("state")
        ]

    def _on_each(self, change: Any, array: jax.Array, *indices: np.ndarray) -> jax.Array:
        """Applies `change` to each rank's part, on its device."""
        return self._first.put([change(shard.data, *indices) for shard in array.addressable_shards])

    def _argument(self, executable: Executable, tensor: TensorSpec, params: Any, state: Any, step: StepInput) -> Any:
        match tensor.kind:
            case "param":
                return next(params)
            case "state":
                return next(state)
            case "rank":
                return self._rank
        return executable.put([step.arrays[tensor.name]] * self._bundle.tp_degree)

    def _executable(self, key: ProgramKey) -> Executable:
        name = self._bundle.find(key).name
        if name not in self._executables:
            self._executables[name] = Executable(self._bundle.hlo(name), self._bundle.tp_degree)
        return self._executables[name]


_copied = jax.jit(lambda array, source_n, target_n: array.at[target_n].set(array[source_n]))
_cleared = jax.jit(lambda array, slot_n: array.at[slot_n].set(0))
