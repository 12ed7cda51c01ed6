"""Runs lowered programs themselves, one replica a core on host devices: no model code, and no chip."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jx_neuron.lowering.execute import Executable
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.runtime import Result
from jx_neuron.runtime.bundle import Bundle, Joined
from jx_neuron.step.shape import Shape
from jx_neuron.util.progress import side_by_side, track


class HostRuntime:
    """Holds each rank's weights and cache on a host device, and runs what neuronx-cc would be given."""

    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._executables: dict[str, Executable] = {}
        first = self._executable(min(bundle.programs))
        params = bundle.of_kind("param")
        self._params = [
            first.put(bundle.parameters[tensor.name]) for tensor in track(params, "placing weights", len(params))
        ]
        self._cache: list[Any] = []
        self._rank = first.put([np.array([rank], np.int32) for rank in range(bundle.tp_degree)])

    @property
    def candidates(self) -> int:
        return self._bundle.candidates

    def run(self, shape: Shape, inputs: Mapping[str, Any]) -> Result:
        program = self._bundle.find(shape)
        executable = self._executable(shape)
        caches = iter(self._cache_for(executable, program))
        self._cache = []
        params = iter(self._params)
        arguments = [self._argument(executable, tensor, params, caches, inputs) for tensor in program.inputs]
        outputs = executable.execute(arguments)
        by_kind = zip(program.outputs, outputs, strict=True)
        self._cache = [executable.put(ranks) for tensor, ranks in by_kind if tensor.kind == "state"]
        token, logits = (
            (tensor, ranks) for tensor, ranks in zip(program.outputs, outputs, strict=True) if tensor.kind == "output"
        )
        return Result(token[1][0], Joined(logits[1], logits[0].split_axis))

    def reset(self, slots: int = 0) -> None:
        self._cache = []

    def keep(self) -> Any:
        kept, self._cache = self._cache, []
        return kept

    def restore(self, kept: Any) -> None:
        self._cache = kept

    def clear(self) -> None:
        self._cache = []

    def reorder(self, index_b: np.ndarray, kept: Any = None) -> None:
        """Each rank's rows on its own device."""
        first = self._executable(min(self._bundle.programs))
        self._cache = [
            first.put([np.asarray(shard.data)[index_b] for shard in array.addressable_shards])
            for array in (self._cache if kept is None else kept)
        ]

    def compile(self, shapes: Sequence[Shape]) -> None:
        by_name = {self._bundle.find(shape).name: shape for shape in shapes}
        wanted = [shape for name, shape in by_name.items() if name not in self._executables]
        side_by_side(self._executable, wanted, "compiling for the host")

    def _cache_for(self, executable: Executable, program: ProgramSpec) -> list[Any]:
        tensors = [tensor for tensor in program.inputs if tensor.kind == "state"]
        if self._cache and self._cache[0].shape == tensors[0].shape:
            return self._cache
        return [_zeros(executable, tensor) for tensor in tensors]

    def _argument(
        self, executable: Executable, tensor: TensorSpec, params: Any, caches: Any, inputs: Mapping[str, Any]
    ) -> Any:
        match tensor.kind:
            case "param":
                return next(params)
            case "state":
                return next(caches)
            case "rank":
                return self._rank
        return executable.put([inputs[tensor.name]] * self._bundle.tp_degree)

    def _executable(self, shape: Shape) -> Executable:
        name = self._bundle.find(shape).name
        if name not in self._executables:
            self._executables[name] = Executable(self._bundle.hlo(name), self._bundle.tp_degree)
        return self._executables[name]


def _zeros(executable: Executable, tensor: TensorSpec) -> jax.Array:
    zeros = np.zeros(tensor.shape, tensor.dtype)
    return executable.put([zeros] * executable.mesh.size)
