"""A model on one CPU: how its weights are laid out in memory, and its steps over them."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.weights import Params, Source, flatten
from jx_neuron.models import Decoder
from jx_neuron.nn.experts import ExpertLinear
from jx_neuron.nn.layers import Layers, Linear, LinearParams, Linears
from jx_neuron.nn.quantized import Form, Quantized
from jx_neuron.nn.state import State
from jx_neuron.runtime.cpu import codes
from jx_neuron.runtime.cpu.formulation import choose, of_codes
from jx_neuron.runtime.cpu.kernel import Formulation, Packed, PackedExperts, pack, pack_experts
from jx_neuron.runtime.cpu.layout import CPU
from jx_neuron.runtime.cpu.ops import CpuOps
from jx_neuron.runtime.sharded import Sharded
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.util.pages import Pages


class OneCPU(Sharded):
    """Kernels are `Packed`, those of a `Linears` as one, and the parameters of `Layers` are stacked.

    A program that reads weights in passes takes the stacks, and loops over the layers. In others XLA would copy a
    matrix out of a stack for its product: they take each layer's part, which is the same memory. Codes are small to
    copy, and a program without a loop would take as much memory as they do. So a model with any loops in all programs,
    except in decode by dots of codes, which would take a third longer.
    """

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: np.dtype[Any]):
        self.formulation: Formulation = choose(dtype).formulation
        self.codes = [of_codes(kind) for kind in sorted(decoder.kinds)]
        super().__init__(decoder, source, mesh, dtype)

    @property
    def ops(self) -> CpuOps:
        return CpuOps(self.formulation, of_codes("int8"))

    def _place(self, source: Source) -> Params:
        module: Any = self._decoder.bind(self._decoder.abstract_params(self._dtype))
        packed = dict(_pack(module, self._dtype, self.formulation))
        decoder, names = replace(self._decoder, quant=None), list(flatten(nnx.state(module)))
        self._packed = replace(decoder, graph=nnx.graphdef(module))
        places = dict(_stack(module, names))
        self._stacked = replace(decoder, graph=nnx.graphdef(module))
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
            is_bits = name in packed and getattr(packed[name].stored, "dtype", None) == self._dtype
            return part.view(self._dtype) if is_bits and self.formulation.dot == "ynnpack" else part

        def stored(arrays: Params) -> Params:
            return {
                name: jax.tree.map(lambda _, array=array: array, packed[name].stored) if name in packed else array
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

    def state(self, slots: int, positions: int, *, verifies: bool) -> State:
        decoder = self._decoder.with_drafts() if verifies else self._decoder
        state = decoder.abstract_state(slots, positions, self._dtype, layout=CPU)
        return jax.tree.map(lambda leaf: leaf.update(sharding=self._everywhere), state)

    def params(self, key: ProgramKey) -> Params:
        return self._stacks if self._loops(key) else self._params

    def _decoder_of(self, key: ProgramKey) -> Decoder:
        return self._stacked if self._loops(key) else self._packed

    def _loops(self, key: ProgramKey) -> bool:
        rows = key.rows * key.tokens
        dots = all(form.dot == "ynnpack" and not form.in_passes(rows) for form in self.codes)
        return (key.tokens > 1 or not dots) if self.codes else self.formulation.in_passes(rows)


class _Packed(NamedTuple):
    """A stored array as a shape, or what has it as its only leaf; the paths of its parts; and what makes it of them."""

    stored: Any
    paths: list[str]
    pack: Callable[[Sequence[np.ndarray]], np.ndarray]


def _pack(module: nnx.Module, dtype: Any, formulation: Formulation) -> Iterator[tuple[str, _Packed]]:
    """Has the kernels of `module`, which holds shapes, be as .kernel and .codes have them: for each array its path, and
    its parts."""
    bits = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype

    def packed(layers: list[LinearParams], paths: list[str], target: str) -> tuple[Any, dict[str, _Packed]]:
        kernels, axes = [layer.kernel.get_value() for layer in layers], layers[0].axes
        if isinstance(kernels[0], Quantized):
            form = kernels[0].form
            whole = tuple(kernel.shape for kernel in kernels)
            arrays = codes.shapes(_sizes(whole, axes), form)
            return codes.PackedCodes(arrays, whole, form, of_codes(form.kind)), {
                f"{target}.{part}": _Packed(
                    array, [f"{path}.{part}" for path in paths], partial(codes.pack_part, form=form, part=part)
                )
                for part, array in arrays.items()
            }
        whole = tuple(tuple(kernel.shape) for kernel in kernels)
        kernel = Packed(cast(Any, jax.ShapeDtypeStruct(_sizes(whole, axes), bits)), whole, axes, dtype, formulation)
        return nnx.Param(kernel), {target: _Packed(kernel, paths, partial(pack, axes=axes))}

    for path, node in list(nnx.iter_graph(module)):
        prefix = ".".join(map(str, path))
        if isinstance(node, Linears):
            paths = [f"{prefix}.{name}.kernel" for name in node.names]
            if len({_form(layer) for layer in node.layers}) == 1:
                kernel, arrays = packed(node.layers, paths, f"{prefix}.fused")
                node.fuse(kernel)
                yield from arrays.items()
            else:
                for layer, name in zip(node.layers, paths, strict=True):
                    layer.kernel, arrays = packed([layer], [name], name)
                    yield from arrays.items()
        elif isinstance(node, Linear):
            name = f"{prefix}.kernel"
            node.kernel, arrays = packed([node], [name], name)
            yield from arrays.items()
        elif isinstance(node, ExpertLinear) and (form := _form(node)) is not None:
            e, k, n = node.kernel.shape
            shapes = {
                part: jax.ShapeDtypeStruct((e, *array.shape), array.dtype)
                for part, array in codes.shapes((n, k), form).items()
            }
            node.kernel = codes.PackedExpertCodes(shapes, form, of_codes(form.kind))
            for part in shapes:
                name, how = f"{prefix}.kernel.{part}", partial(codes.pack_expert_part, form=form, part=part)
                yield name, _Packed(getattr(node.kernel, part).get_value(), [name], how)
        elif isinstance(node, ExpertLinear):
            e, k, n = node.kernel.get_value().shape
            abstract: Any = jax.ShapeDtypeStruct((e, n, k), bits)
            node.kernel = nnx.Param(PackedExperts(abstract, dtype, formulation))
            yield f"{prefix}.kernel", _Packed(node.kernel.get_value(), [f"{prefix}.kernel"], pack_experts)


def _form(layer: Any) -> Form | None:
    return layer.kernel.form if isinstance(layer.kernel, Quantized) else None


def _sizes(shapes: Sequence[tuple[int, ...]], axes: int) -> tuple[int, int]:
    """Outputs of all matrices, and their inputs."""
    return sum(math.prod(shape[axes:]) for shape in shapes), math.prod(shapes[0][:axes])


def _stack(module: nnx.Module, names: list[str]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Stacks the `Layers` of `module`: for each of their parameters the path of the stack, and its index there."""
    for path, node in list(nnx.iter_graph(module)):
        if isinstance(node, Layers) and (period := node.stack()):
            prefix = "".join(f"{key}." for key in path)
            for name in names:
                if name.startswith(prefix):
                    layer, rest = name.removeprefix(prefix).split(".", 1)
                    yield name, (f"{prefix}{int(layer) % period}.{rest}", int(layer) // period)
