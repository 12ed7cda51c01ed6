"""The step through `jax.jit`: on a CPU, a GPU, or the Neuron PJRT plugin."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.weights import Params, Source
from jx_neuron.errors import InputError
from jx_neuron.lowering import _jaxlib
from jx_neuron.models import Decoder
from jx_neuron.nn import cache as kv
from jx_neuron.nn import ops as products
from jx_neuron.nn import sharding
from jx_neuron.nn.cache import Cache
from jx_neuron.runtime import Result
from jx_neuron.runtime import xla_options as compiled
from jx_neuron.runtime.cpu import OneCPU
from jx_neuron.step.shape import Shape
from jx_neuron.step.step import step
from jx_neuron.util.pages import check_room, give_back, uncollected
from jx_neuron.util.progress import side_by_side

MOST_PROGRAMS = 128
"""Programs that a model keeps. One takes 2 to 5 MB and 160 of the 65530 memory maps that Linux gives a process."""


def mesh(tp_degree: int) -> Mesh:
    """A mesh over JAX's devices; where these are CPU devices and too few, over CPU devices of this package's own.

    Raises InputError where JAX has too few devices of another kind.
    """
    devices = jax.devices()
    if len(devices) < tp_degree and devices[0].platform == "cpu":
        devices = _jaxlib.client(tp_degree).devices()
    return sharding.mesh(tp_degree, devices)


class XlaRuntime:
    """Programs are compiled when first needed, and the `MOST_PROGRAMS` that were used last are kept.

    The cache is as long as `reset` said, and grows with larger buckets.
    """

    candidates = None

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: Any):
        compiled.keep_between_processes()
        self.decoder, self.mesh, self.dtype = decoder, mesh, jnp.dtype(dtype)
        self._platform = mesh.devices.flat[0].platform
        alone: dict[str, type[OneCPU | _OneGPU]] = {"cpu": OneCPU, "gpu": _OneGPU}
        placed = alone.get(self._platform, _Sharded) if mesh.size == 1 else _Sharded
        self._placed: OneCPU | _Sharded = placed(decoder, source, mesh, self.dtype)
        give_back()
        self._programs: OrderedDict[tuple[Shape, int], Any] = OrderedDict()
        self._cache: Cache | None = None
        self._least_slots = 0

    def run(self, shape: Shape, inputs: Mapping[str, Any]) -> Result:
        cache = self._cache_for(shape)
        program = self._program(shape, kv.slots(cache))
        self._cache = None
        token_b1, logits, self._cache = program(
            self._placed.params(shape), cache, *(inputs[name] for name in shape.inputs())
        )
        return Result(token_b1, logits)

    def reset(self, slots: int = 0) -> None:
        self._cache, self._least_slots = None, slots

    def keep(self) -> Any:
        kept, self._cache = self._cache, None
        return kept

    def restore(self, kept: Any) -> None:
        self._cache = kept

    def clear(self) -> None:
        self._cache = None

    def reorder(self, index_b: np.ndarray, kept: Any = None) -> None:
        with jax.set_mesh(self.mesh):
            self._cache = _take(self._cache if kept is None else kept, index_b)

    def compile(self, shapes: list[Shape]) -> None:
        wanted = dict.fromkeys((shape, max(shape.slots, self._least_slots)) for shape in shapes)
        side_by_side(lambda of: self._program(*of), [of for of in wanted if of not in self._programs], "compiling")

    def _program(self, shape: Shape, slots: int) -> Any:
        """The program of `shape` over a cache of `slots` slots."""
        key = shape, slots
        program = self._programs.get(key) or self._compiled(shape, slots)
        self._programs[key] = program
        self._programs.move_to_end(key)
        while len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return program

    def _compiled(self, shape: Shape, slots: int) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        split = NamedSharding(self.mesh, PartitionSpec(*[None] * (2 if shape.all_logits else 1), "tp"))
        cache = self._placed.cache(shape.batch, slots)
        several = products.are_several(shape.batch * shape.tokens)
        program = jax.jit(
            self._placed.step(shape),
            donate_argnums=1,
            out_shardings=(everywhere, split, jax.tree.map(_sharding, cache)),
            compiler_options=compiled.options(self._platform, self.mesh.size == 1, several),
        )
        inputs = [jax.ShapeDtypeStruct(*of, sharding=everywhere) for of in shape.inputs().values()]
        give_back()
        with jax.set_mesh(self.mesh), compiled.precision(self._platform, self.dtype):
            with uncollected():
                lowered = program.lower(self._placed.params(shape), cache, *inputs)
            executable = lowered.compile()
        give_back()
        return executable

    def _cache_for(self, shape: Shape) -> Cache:
        cache = self._cache
        if cache is not None and (rows := kv.batch(cache)) != shape.batch:
            raise InputError(
                f"the cache holds {rows} rows, padding counted, and this call goes on from it with {shape.batch}; "
                "go on with as many rows as the call before had, or begin again with whole prompts"
            )
        if cache is not None and kv.slots(cache) >= shape.slots:
            return cache
        slots = max(shape.slots, self._least_slots) if cache is None else shape.slots
        empty = self._placed.cache(shape.batch, slots)
        if self._platform == "cpu":
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(empty))
            check_room(size, f"the keys and values of {shape.batch} rows and {slots} positions take")
        if cache is not None:
            return _grow(cache, slots)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)
        return jax.device_put(zeros, jax.tree.map(_sharding, empty))


class _Sharded:
    """A model on several devices, or on a chip."""

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: np.dtype[Any]):
        self._decoder, self._mesh, self._dtype = decoder, mesh, dtype
        self._params = self._place(source)

    def _place(self, source: Source) -> Params:
        return source.place(self._mesh)

    def cache(self, batch: int, slots: int) -> Cache:
        """The cache as shapes."""
        return self._decoder.abstract_cache(batch, slots, self._dtype, self._mesh)

    def params(self, shape: Shape) -> Params:
        """What the step of `shape` takes for parameters."""
        return self._params

    def step(self, shape: Shape) -> Callable[..., tuple[Array, Array, Cache]]:
        """The step of `shape`, over `params` of it."""
        return step(self._decoder, shape)


class _OneGPU(_Sharded):
    """A model on one GPU. Kernels lie with their outputs first, as most checkpoints have them."""

    def _place(self, source: Source) -> Params:
        def put_first(axes: int, kernels: Sequence[Any]) -> Any:
            return products.outputs_first(kernels[0], axes)

        return source.place(self._mesh, {(path,): partial(put_first, axes) for path, axes in self._axes.items()})

    @cached_property
    def _axes(self) -> dict[str, int]:
        """Of each kernel, how many input axes it has."""
        return {path: axes for paths, axes in self._decoder.kernels.items() for path in paths}

    def step(self, shape: Shape) -> Callable[..., tuple[Array, Array, Cache]]:
        traced, axes = super().step(shape), self._axes

        def run(params: Params, cache: Cache, *inputs: Array) -> tuple[Array, Array, Cache]:
            values = {
                path: products.inputs_first(array, axes[path]) if path in axes else array
                for path, array in params.items()
            }
            with products.for_gpu():
                return traced(values, cache, *inputs)

        return run


def _sharding(leaf: Any) -> Any:
    return leaf.sharding


_take = jax.jit(kv.take)
_grow = jax.jit(kv.grow, static_argnums=1)
