"""A model on one CPU: how its weights are laid out in memory, and its steps over them."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.weights import Params, Source, flatten
from jx_neuron.models import Decoder
from jx_neuron.nn.experts import ExpertLinear
from jx_neuron.nn.layers import Layers, Linear, LinearParams, Linears
from jx_neuron.nn.state import State
from jx_neuron.runtime.cpu.formulation import choose
from jx_neuron.runtime.cpu.kernel import Formulation, Packed, PackedExperts, pack, pack_experts
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.cpu.ops import CpuOps
from jx_neuron.runtime.sharded import Sharded
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.util.pages import Pages


class OneCPU(Sharded):
    """Kernels are `Packed`, those of a `Linears` as one, and the parameters of `Layers` are stacked.

    A program that reads weights in passes takes the stacks, and loops over the layers. In others XLA would copy a
    matrix out of a stack for its product: they take each layer's part, which is the same memory.
    """

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: np.dtype[Any]):
        self.formulation: Formulation = choose(dtype).formulation
        super().__init__(decoder, source, mesh, dtype)

    @property
    def ops(self) -> CpuOps:
        return CpuOps(self.formulation)

    def _place(self, source: Source) -> Params:
        module: Any = self._decoder.bind(self._decoder.abstract_params(self._dtype))
        packed = dict(_pack(module, self._dtype, self.formulation))
        self._packed, names = replace(self._decoder, graph=nnx.graphdef(module)), list(flatten(nnx.state(module)))
        places = dict(_stack(module, names))
        self._stacked = replace(self._decoder, graph=nnx.graphdef(module))
        sizes, stacks = Counter(stack for stack, _ in places.values()), dict[str, np.ndarray]()
        pages, first = Pages(), Lock()

        def put(name: str, array: np.ndarray) -> np.ndarray:
            if name not in places:
                return pages.put(array)
            stack, index = places[name]
            with first:
                if stack not in stacks:
                    stacks[stack] = pages.empty((sizes[stack], *array.shape), array.dtype)
            part = stacks[stack][index, ...]
            part[...] = array
            # XLA would copy the bits to take them as what they are
            return part.view(self._dtype) if name in packed and self.formulation.dot == "ynnpack" else part

        def stored(arrays: Params) -> Params:
            return {
                name: jax.tree.map(lambda _, array=array: array, packed[name].kernel) if name in packed else array
                for name, array in arrays.items()
            }

        packing = {name: (parts.paths, parts.pack) for name, parts in packed.items()}
        arrays = source.place(self._mesh, packing, put)
        whole = {name: array for name, array in arrays.items() if name not in places}
        self._stacks = stored(whole | jax.device_put(stacks, self._everywhere))
        return stored(arrays)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec())

    def state(self, slots: int, positions: int) -> State:
        state = self._decoder.abstract_state(slots, positions, self._dtype, layout=CPU)
        return jax.tree.map(lambda leaf: leaf.update(sharding=self._everywhere), state)

    def params(self, key: ProgramKey) -> Params:
        return self._stacks if self._reads_in_passes(key) else self._params

    def _decoder_of(self, key: ProgramKey) -> Decoder:
        return self._stacked if self._reads_in_passes(key) else self._packed

    def _reads_in_passes(self, key: ProgramKey) -> bool:
        return self.formulation.in_passes(key.rows * key.tokens)


class _Packed(NamedTuple):
    """A kernel that holds a shape, the paths of the parameters in it, and how their arrays become its own."""

    kernel: Packed | PackedExperts
    paths: list[str]
    pack: Callable[[Sequence[np.ndarray]], np.ndarray]


def _pack(module: nnx.Module, dtype: Any, formulation: Formulation) -> Iterator[tuple[str, _Packed]]:
    """Has the kernels of `module`, which holds shapes, be `Packed` or `PackedExperts`: for each its path, and its
    parts."""
    stored = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype

    def packed(layers: list[LinearParams]) -> Packed:
        shapes, axes = tuple(tuple(layer.kernel.get_value().shape) for layer in layers), layers[0].axes
        n, k = sum(math.prod(shape[axes:]) for shape in shapes), math.prod(shapes[0][:axes])
        abstract: Any = jax.ShapeDtypeStruct((n, k), stored)
        return Packed(abstract, shapes, axes, dtype, formulation)

    for path, node in list(nnx.iter_graph(module)):
        prefix = ".".join(map(str, path))
        if isinstance(node, Linears):
            kernel = packed(node.layers)
            node.fuse(kernel)
            paths = [f"{prefix}.{name}.kernel" for name in node.names]
            yield f"{prefix}.fused", _Packed(kernel, paths, partial(pack, axes=kernel.axes))
        elif isinstance(node, Linear):
            kernel = packed([node])
            node.kernel = nnx.Param(kernel)
            yield f"{prefix}.kernel", _Packed(kernel, [f"{prefix}.kernel"], partial(pack, axes=kernel.axes))
        elif isinstance(node, ExpertLinear):
            e, k, n = node.kernel.get_value().shape
            abstract: Any = jax.ShapeDtypeStruct((e, n, k), stored)
            node.kernel = nnx.Param(PackedExperts(abstract, dtype, formulation))
            yield f"{prefix}.kernel", _Packed(node.kernel.get_value(), [f"{prefix}.kernel"], pack_experts)


def _stack(module: nnx.Module, names: list[str]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Stacks the `Layers` of `module`: for each of their parameters the path of the stack, and its index there."""
    for path, node in list(nnx.iter_graph(module)):
        if isinstance(node, Layers) and (period := node.stack()):
            prefix = "".join(f"{key}." for key in path)
            for name in names:
                if name.startswith(prefix):
                    layer, rest = name.removeprefix(prefix).split(".", 1)
                    yield name, (f"{prefix}{int(layer) % period}.{rest}", int(layer) // period)
