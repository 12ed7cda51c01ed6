"""A model on one CPU: how its weights are laid out in memory, and its steps over them."""

import re
from collections.abc import Callable
from functools import cached_property, partial
from threading import Lock
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.weights import Params, Source, joint
from jx_neuron.models import Decoder
from jx_neuron.nn import layers as nn
from jx_neuron.nn import ops as products
from jx_neuron.nn.state import State
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step import step
from jx_neuron.util.pages import Pages

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class _Held(NamedTuple):
    """What a placed array holds: parameters of these shapes, joined where they are kernels, with so many input axes."""

    shapes: tuple[tuple[int, ...], ...]
    axes: int | None
    dtype: np.dtype[Any]

    def apart(self, array: Array) -> list[Array]:
        """They, as the model made them."""
        return [array] if self.axes is None else products.apart(array, self.shapes, self.axes, self.dtype)

    def of_layer(self, stack: Array, layer: Any) -> list[Array]:
        """The same of a layer, where `stack` has such an array for each."""
        return self.apart(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False))


_of_layer = jax.jit(_Held.of_layer, static_argnums=0)  # traced once, for all layers


class OneCPU:
    """Weights lie as a CPU reads them fastest, and the model sees them as it made them.

    Kernels of one input lie in one array, outputs first (jx_neuron/nn/ops.py), and what layers alike have each lies
    in one array. A program that reads weights in passes takes those, and goes through its layers in a loop. In others
    XLA would copy a matrix out of them for its product: they take each layer's part, which is the same memory.
    """

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: np.dtype[Any]):
        self._decoder, self._dtype, self._everywhere = decoder, dtype, NamedSharding(mesh, PartitionSpec())
        stacks: dict[str, np.ndarray] = {}
        pages, first = Pages(), Lock()

        def put(name: str, array: np.ndarray) -> np.ndarray:
            if name not in self._layer:
                return pages.put(array)
            bare, layer = self._layer[name]
            with first:
                if bare not in stacks:
                    stacks[bare] = pages.empty((len(self._layered[bare]), *array.shape), array.dtype)
            place = stacks[bare][layer, ...]
            place[...] = array
            return place

        joined = {paths: partial(products.together, axes=axes) for paths, axes in decoder.kernels.items()}
        self._params = source.place(mesh, joined, put)
        alone = {name: array for name, array in self._params.items() if name not in self._layer}
        self._together = alone | jax.device_put(stacks, self._everywhere)

    @cached_property
    def _paths(self) -> dict[str, tuple[str, ...]]:
        """The parameters that each placed array holds, by its name."""
        several = {path for paths in self._decoder.kernels for path in paths}
        alone = [(path,) for path in self._decoder.shapes if path not in several]
        return {joint(paths): paths for paths in [*self._decoder.kernels, *alone]}

    @cached_property
    def _layered(self) -> dict[str, list[str]]:
        """Placed arrays that layers have alike, in order of layers, by their name with {i} for the layer."""
        found: dict[tuple[str, Any], dict[int, str]] = {}
        for name, paths in self._paths.items():
            if number := _NUMBER.search(name):
                bare = joint([_NUMBER.sub("{i}", path, count=1) for path in paths])
                found.setdefault((bare, self._held(name)), {})[int(number[0])] = name
        return {
            bare: [names[i] for i in range(len(names))]
            for (bare, _), names in found.items()
            if len(names) > 1 and max(names) == len(names) - 1
        }

    @cached_property
    def _layer(self) -> dict[str, tuple[str, int]]:
        """The inverse of `_layered`."""
        return {name: (bare, i) for bare, names in self._layered.items() for i, name in enumerate(names)}

    def _held(self, name: str) -> _Held:
        paths = self._paths[name]
        return _Held(tuple(self._decoder.shapes[path] for path in paths), self._decoder.kernels.get(paths), self._dtype)

    def state(self, slots: int, positions: int) -> State:
        """A state table as shapes."""
        state = self._decoder.abstract_state(slots, positions, self._dtype, layout=CPU)
        return jax.tree.map(lambda leaf: leaf.update(sharding=self._everywhere), state)

    def params(self, key: ProgramKey) -> Params:
        """What the step of `key` takes for parameters."""
        return self._together if products.are_few(key.rows * key.tokens, self._dtype) else self._params

    def step(self, key: ProgramKey) -> Callable[..., tuple[Array, Array, State]]:
        """The step of `key`, over `params` of it."""
        traced = step(self._decoder, key)

        def run(params: Params, state: State, *inputs: Array) -> tuple[Array, Array, State]:
            values: Params = {}
            layered = []
            with products.for_cpu():
                for name, array in params.items():
                    if name not in self._layered:
                        values |= zip(self._paths[name], self._held(name).apart(array), strict=True)
                        continue
                    held = self._held(self._layered[name][0])
                    of = partial(held.of_layer, array)
                    for i, one in enumerate(self._layered[name]):
                        parts = _of_layer(held, array, np.int32(i))
                        values |= zip(self._paths[one], parts, strict=True)
                        layered += [(part, nn.Layered(of, which, i)) for which, part in enumerate(parts)]
                with nn.lying_together(layered):
                    return traced(values, state, *inputs)

        return run
