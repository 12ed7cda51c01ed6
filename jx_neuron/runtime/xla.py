"""The step through `jax.jit`: on a CPU, a GPU, or the Neuron PJRT plugin."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron import cache as kv
from jx_neuron import nn, products
from jx_neuron.cache import Cache
from jx_neuron.lowering.shape import Shape
from jx_neuron.lowering.step import step
from jx_neuron.models import Decoder
from jx_neuron.pages import Pages, give_back
from jx_neuron.progress import side_by_side
from jx_neuron.runtime import Result, compiled
from jx_neuron.weights import Params, Source, joint


class XlaRuntime:
    """Programs are compiled when first needed; the cache is as long as `reset` said, and grows with larger buckets."""

    candidates = None

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: Any):
        compiled.keep_between_processes()
        self.decoder, self.mesh, self.dtype = decoder, mesh, jnp.dtype(dtype)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._one_cpu = on_cpu and mesh.size == 1
        self._options = compiled.cpu_options(alone=self._one_cpu) if on_cpu else {}
        # kernels lie in memory as a CPU reads them fastest; the model sees them as it made them
        model = cast(nnx.Module, decoder.bind(decoder.abstract_params(dtype)))
        self._kernels = nn.kernels(model) if self._one_cpu else {}
        joined = {paths: partial(products.together, axes=axes) for paths, axes in self._kernels.items()}
        self._params = source.place(mesh, joined, Pages().put) if self._one_cpu else source.place(mesh)
        give_back()
        self._programs: dict[tuple[Shape, int], Any] = {}
        self._cache: Cache | None = None
        self._least_slots = 0

    def run(self, shape: Shape, inputs: Mapping[str, Any]) -> Result:
        cache = self._cache_for(shape)
        program = self._program(shape, kv.slots(cache))
        self._cache = None
        token_b1, logits, self._cache = program(self._params, cache, *(inputs[name] for name in shape.inputs()))
        return Result(token_b1, logits)

    def reset(self, slots: int = 0) -> None:
        self._cache, self._least_slots = None, slots

    def keep(self) -> Any:
        kept, self._cache = self._cache, None
        return kept

    def reorder(self, index_b: np.ndarray, kept: Any = None) -> None:
        with jax.set_mesh(self.mesh):
            self._cache = _take(self._cache if kept is None else kept, index_b)

    def compile(self, shapes: list[Shape]) -> None:
        wanted = dict.fromkeys((shape, max(shape.slots, self._least_slots)) for shape in shapes)
        side_by_side(lambda of: self._program(*of), [of for of in wanted if of not in self._programs], "compiling")

    def _program(self, shape: Shape, slots: int) -> Any:
        """The program of `shape` over a cache of `slots` slots."""
        key = shape, slots
        if key not in self._programs:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            split = NamedSharding(self.mesh, PartitionSpec(*[None] * (2 if shape.all_logits else 1), "tp"))
            caches = NamedSharding(self.mesh, kv.PARTITION)
            program = jax.jit(
                self._step(shape),
                donate_argnums=1,
                out_shardings=(everywhere, split, caches),
                compiler_options=self._options,
            )
            cache = self._abstract_cache(shape.batch, slots)
            inputs = [jax.ShapeDtypeStruct(*of, sharding=everywhere) for of in shape.inputs().values()]
            give_back()
            with jax.set_mesh(self.mesh):
                self._programs[key] = program.lower(self._params, cache, *inputs).compile()
            give_back()
        return self._programs[key]

    def _step(self, shape: Shape) -> Callable[..., tuple[Array, Array, Cache]]:
        traced = step(self.decoder, shape)
        if not self._one_cpu:
            return traced

        def run(params: Params, cache: Cache, *inputs: Array) -> tuple[Array, Array, Cache]:
            params, shapes = dict(params), self.decoder.shapes
            for paths, axes in self._kernels.items():
                kernels = products.apart(params.pop(joint(paths)), [shapes[path] for path in paths], axes, self.dtype)
                params |= zip(paths, kernels, strict=True)
            with products.for_cpu():
                token_b1, logits, cache = traced(params, kv.unpacked(cache, self.dtype), *inputs)
            return token_b1, logits, kv.packed(cache)

        return run

    def _cache_for(self, shape: Shape) -> Cache:
        cache = self._cache
        if cache is None or cache[0].k_bksh.shape[0] != shape.batch:
            empty = self._abstract_cache(shape.batch, max(shape.slots, self._least_slots))
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)
            return jax.device_put(zeros, jax.tree.map(lambda leaf: leaf.sharding, empty))
        if kv.slots(cache) < shape.slots:
            return (_grow_packed if self._one_cpu else _grow)(cache, shape.slots)
        return cache

    def _abstract_cache(self, batch: int, slots: int) -> Cache:
        cache = self.decoder.abstract_cache(batch, slots, self.dtype, self.mesh)
        if not self._one_cpu:
            return cache
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), jax.eval_shape(kv.packed, cache))


def _grown(cache: Cache, slots: int) -> Cache:
    return kv.packed(kv.grow(kv.unpacked(cache, cache[0].k_bksh.dtype), slots))


_take = jax.jit(kv.take)
_grow = jax.jit(kv.grow, static_argnums=1)
_grow_packed = jax.jit(_grown, static_argnums=1)
