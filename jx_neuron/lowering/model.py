"""A decoder's steps as programs, from its config alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jx_neuron.lowering.program import Program, Traced, lower_many, trace
from jx_neuron.lowering.signature import Kind
from jx_neuron.models import Decoder
from jx_neuron.nn import cache
from jx_neuron.nn.sharding import AXIS
from jx_neuron.step.shape import Shape
from jx_neuron.step.step import step
from jx_neuron.util.progress import track


def trace_step(decoder: Decoder, shape: Shape, slots: int, dtype: Any) -> Traced:
    """The program of `shape` with a cache of `slots` positions, traced and not yet partitioned."""
    params = decoder.abstract_params(dtype)
    inputs = [jax.ShapeDtypeStruct(*of) for of in shape.inputs().values()]
    kinds: list[Kind] = ["param", "state"]
    kinds += ["input"] * len(inputs)
    split = PartitionSpec(*[None] * (2 if shape.all_logits else 1), AXIS)
    return trace(
        step(decoder, shape),
        params,
        decoder.abstract_cache(shape.batch, slots, dtype),
        *inputs,
        tp_degree=decoder.tp_degree,
        in_specs=[{path: decoder.partition(path) for path in params}, cache.PARTITION, *[None] * len(inputs)],
        out_specs=(PartitionSpec(), split, cache.PARTITION),
        donate_argnums=(1,),
        name=shape.name,
        input_kinds=kinds,
        input_names=[
            *params,
            *(f"cache.{i}.{of}" for i in range(decoder.config.layers) for of in "kv"),
            *shape.inputs(),
        ],
    )


def lower_model(
    decoder: Decoder, shapes: Sequence[Shape], slots: int, dtype: Any, workers: int = 2
) -> Iterator[Program]:
    """The programs of `shapes`, in order, `workers` at a time while the next is traced, under a progress bar.

    Raises LoweringError where one cannot be partitioned or legalized.
    """
    traced = (trace_step(decoder, shape, slots, dtype) for shape in shapes)
    yield from track(lower_many(traced, workers), "lowering", len(shapes))
