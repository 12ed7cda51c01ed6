"""Rules on gathers and scatters whose indices are known to leave the operand."""

from __future__ import annotations

from collections.abc import Iterator

from jx_neuron.lowering.hlo.fold import Value, fold
from jx_neuron.lowering.hlo.graph import Instruction
from jx_neuron.lowering.verify.rules import Target, rule

_ADVICE = (
    "clip the indices themselves with jnp.clip; for a position table, n_positions must not exceed the"
    " model's max_position_embeddings"
)


@rule(
    "gather-bounds", "EVRF056",
    ops=["gather"],
    title="A gather reads outside its operand",
    advice=_ADVICE,
)  # fmt: skip
def gather_bounds(i: Instruction, target: Target) -> str | None:
    """Reported where the indices follow from constants and iotas alone, so that it is certain. Indices that
    depend on inputs are checked by nobody before they fail on the device. XLA clamps the indices of a gather, and jnp's
    mode="clip" counts on that; Neuron does not."""
    numbers = i.proto.gather_dimension_numbers
    sizes = list(i.proto.gather_slice_sizes)
    room = {d: i.operands[0].shape.dims[d] - sizes[d] for d in numbers.start_index_map}
    return _out_of_bounds(i.operands[1], numbers.index_vector_dim, list(numbers.start_index_map), room)


@rule(
    "scatter-bounds", "EVRF031",
    ops=["scatter"],
    title="A scatter writes outside its operand",
    advice=_ADVICE,
)  # fmt: skip
def scatter_bounds(i: Instruction, target: Target) -> str | None:
    """As for gathers. XLA skips updates that are out of bounds; Neuron does not."""
    numbers, operand = i.proto.scatter_dimension_numbers, i.operands[0].shape.dims
    indices, update = i.operands[len(i.operands) // 2], i.operands[-1].shape.dims
    outside = {*numbers.inserted_window_dims, *numbers.input_batching_dims}
    window_dims = [d for d in range(len(operand)) if d not in outside]
    window = {d: update[n] for d, n in zip(window_dims, numbers.update_window_dims, strict=True)}
    axes = list(numbers.scatter_dims_to_operand_dims)
    return _out_of_bounds(indices, numbers.index_vector_dim, axes, {d: operand[d] - window.get(d, 1) for d in axes})


def _out_of_bounds(indices: Instruction, vector_dim: int, axes: list[int], room: dict[int, int]) -> str | None:
    for axis, values in zip(axes, _components(indices, vector_dim), strict=False):
        if values is None or not values.size:
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > room[axis]:
            return f"has indices from {low} to {high} along dimension {axis}, which allows 0 to {room[axis]}"
    return None


def _components(indices: Instruction, vector_dim: int) -> Iterator[Value | None]:
    """The values of each index of an index vector, None where they depend on inputs."""
    if vector_dim == len(indices.shape.dims):
        yield fold(indices)
    elif indices.opcode == "concatenate" and indices.proto.dimensions[0] == vector_dim:
        for part in indices.operands:
            yield from _components(part, vector_dim)
    else:
        values = fold(indices)
        for n in range(indices.shape.dims[vector_dim]):
            yield None if values is None else values.take(n, vector_dim)
