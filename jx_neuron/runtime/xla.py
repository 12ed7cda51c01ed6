"""The step through `jax.jit`: on a CPU, a GPU, or the Neuron PJRT plugin."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron import cache as kv
from jx_neuron.cache import Cache
from jx_neuron.lowering.shape import Shape
from jx_neuron.lowering.step import step
from jx_neuron.models import Decoder
from jx_neuron.progress import track
from jx_neuron.runtime import Result
from jx_neuron.weights import Params


class XlaRuntime:
    """Programs are compiled when first needed; the cache is as long as the largest bucket used since `reset`."""

    candidates = None

    def __init__(self, decoder: Decoder, params: Params, mesh: Mesh, dtype: Any):
        self.decoder, self.params, self.mesh, self.dtype = decoder, params, mesh, jnp.dtype(dtype)
        self._programs: dict[Shape, Any] = {}
        self._cache: Cache | None = None

    def run(self, shape: Shape, inputs: Mapping[str, Any]) -> Result:
        cache = self._cache_for(shape)
        self._cache = None
        with jax.set_mesh(self.mesh):
            token_b1, logits, self._cache = self._program(shape)(
                self.params, cache, *(inputs[name] for name in shape.inputs())
            )
        return Result(token_b1, logits)

    def reset(self) -> None:
        self._cache = None

    def compile(self, shapes: list[Shape]) -> None:
        for shape in track(shapes, "compiling", len(shapes)):
            cache = self.decoder.abstract_cache(shape.batch, shape.slots, self.dtype, self.mesh)
            inputs = (jax.ShapeDtypeStruct(*of) for of in shape.inputs().values())
            with jax.set_mesh(self.mesh):
                self._program(shape).lower(self.params, cache, *inputs).compile()

    def _program(self, shape: Shape) -> Any:
        if shape not in self._programs:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            split = NamedSharding(self.mesh, PartitionSpec(*[None] * (2 if shape.all_logits else 1), "tp"))
            caches = NamedSharding(self.mesh, kv.PARTITION)
            self._programs[shape] = jax.jit(
                step(self.decoder, shape), donate_argnums=1, out_shardings=(everywhere, split, caches)
            )
        return self._programs[shape]

    def _cache_for(self, shape: Shape) -> Cache:
        cache = self._cache
        if cache is None or cache[0].k_bksh.shape[0] != shape.batch:
            empty = self.decoder.abstract_cache(shape.batch, shape.slots, self.dtype, self.mesh)

            def zeros(leaf: Any) -> Array:
                return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

            return jax.tree.map(zeros, empty)
        if kv.slots(cache) < shape.slots:
            return jax.jit(kv.grow, static_argnums=1)(cache, shape.slots)
        return cache
