"""A decoder's steps as programs, from its config alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jx_neuron.lowering.program import Program, Traced, lower_many, trace
from jx_neuron.lowering.signature import Kind
from jx_neuron.models import Decoder
from jx_neuron.nn.ops import Ops, using
from jx_neuron.nn.sharding import AXIS
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step import inputs, step
from jx_neuron.util.progress import track


def trace_step(decoder: Decoder, key: ProgramKey, slots: int, positions: int, dtype: Any) -> Traced:
    """Traces the program of `key` over a state table of `slots` and `positions`."""
    params, state = decoder.abstract_params(dtype), decoder.abstract_state(slots, positions, dtype)
    layouts = inputs(decoder, key, dtype)
    arrays = [jax.ShapeDtypeStruct(*layout) for layout in layouts.values()]
    kinds: list[Kind] = ["param", "state"]
    kinds += ["input"] * len(arrays)
    logits = PartitionSpec(*[None] * (2 if key.gives_every else 1), AXIS)
    with using(Ops(cores=decoder.tp_degree)):
        return trace(
            step(decoder, key),
            params,
            state,
            *arrays,
            tp_degree=decoder.tp_degree,
            in_specs=[{path: decoder.partition(path) for path in params}, state.partition(), *[None] * len(arrays)],
            out_specs=(PartitionSpec(), logits, *[PartitionSpec()] * bool(key.taps), state.partition()),
            donate_argnums=(1,),
            name=key.name,
            input_kinds=kinds,
            input_names=[
                *params,
                *(f"state.{name}" for name in decoder.state_rows),
                "state.token",
                *layouts,
            ],
        )


def lower_model(
    decoder: Decoder, keys: Sequence[ProgramKey], slots: int, positions: int, dtype: Any, workers: int = 2
) -> Iterator[Program]:
    """The programs of `keys`, in order, over a state table of `slots` and `positions`.

    `workers` are lowered at a time while the next is traced, under a progress bar.

    Raises LoweringError where one cannot be partitioned or legalized.
    """
    traced = (trace_step(decoder, key, slots, positions, dtype) for key in keys)
    yield from track(lower_many(traced, workers), "lowering", len(keys))
