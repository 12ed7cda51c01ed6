"""A read-only view of an HloModuleProto as a graph: instructions know their operands and what they call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jx_neuron.errors import LoweringError
from jx_neuron.lowering.hlo import proto


@dataclass(frozen=True, slots=True)
class Shape:
    """An array's element type (as numpy names it) and dimensions, or a tuple's parts.

    Attributes:
        dims: sizes; of a dynamic dimension, its bound.
        dynamic: which dimensions are dynamic.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    parts: tuple[Shape, ...] = ()
    bytes: int = 0
    dynamic: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.dtype == "tuple":
            return f"({', '.join(map(str, self.parts))})"
        sizes = (f"<={size}" if axis in self.dynamic else str(size) for axis, size in enumerate(self.dims))
        return f"{self.dtype}[{','.join(sizes)}]"

    @property
    def size(self) -> int:
        """Elements of an array."""
        return math.prod(self.dims)

    @property
    def is_integer(self) -> bool:
        return self.dtype.startswith(("int", "uint"))

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    def leaves(self) -> Iterator[Shape]:
        """The arrays of this shape, in order."""
        if self.dtype == "tuple":
            for part in self.parts:
                yield from part.leaves()
        else:
            yield self


@dataclass(eq=False, slots=True)
class Instruction:
    """One HLO instruction. `proto` holds what is particular to its opcode."""

    name: str
    opcode: str
    shape: Shape
    proto: Any
    computation: Computation
    operands: tuple[Instruction, ...] = ()
    called: tuple[Computation, ...] = ()

    @property
    def argument(self) -> Instruction | None:
        """The operand that a parameter receives, where exactly one `call` reaches its computation."""
        callers = self.computation.callers
        if self.opcode != "parameter" or len(callers) != 1 or callers[0].opcode != "call":
            return None
        return callers[0].operands[int(self.proto.parameter_number)]


@dataclass(eq=False, slots=True)
class Computation:
    """A computation's instructions, each after its operands."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    callers: list[Instruction] = field(default_factory=list)
    root: Instruction = field(init=False)

    @property
    def parameters(self) -> list[Instruction]:
        parameters = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.proto.parameter_number))


@dataclass(eq=False, slots=True)
class Module:
    """An HLO module: its computations, callees first, and which of them is the entry."""

    computations: list[Computation]
    entry: Computation
    proto: Any

    @property
    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations:
            yield from computation.instructions

    @property
    def aliases(self) -> dict[int, int]:
        """Entry parameter -> the output (its position in the root tuple) that it shares its buffer with."""
        entries = self.proto.input_output_alias.entries
        return {e.parameter_number: next(iter(e.output_shape_index), 0) for e in entries}

    def source(self, instruction: Instruction) -> str | None:
        """`file:line` of the code that an instruction came from, or JAX's name for it, if the module says."""
        meta, frames = instruction.proto.metadata, self.proto.stack_frame_index
        if meta.source_file:
            return f"{meta.source_file}:{meta.source_line}"
        if 0 < meta.stack_frame_id <= len(frames.stack_frames):
            location = frames.file_locations[frames.stack_frames[meta.stack_frame_id - 1].file_location_id - 1]
            return f"{frames.file_names[location.file_name_id - 1]}:{location.line}"
        return meta.op_name or None


def parse(hlo_module: bytes) -> Module:
    """Reads a serialized HloModuleProto.

    Raises:
        LoweringError: the bytes are no HloModuleProto, or one that refers to something it does not contain.
    """
    message = proto.parse(hlo_module)
    try:
        return _link(message)
    except KeyError as error:
        raise LoweringError(
            f"the HLO module {message.name!r} refers to the id {error}, which it does not hold; write it again"
        ) from error


def _link(message: Any) -> Module:
    computations = {c.id: Computation(c.name) for c in message.computations}
    for source in message.computations:
        computation = computations[source.id]
        by_id: dict[int, Instruction] = {}
        for p in source.instructions:
            instruction = Instruction(p.name, p.opcode, _shape(p.shape), p, computation)
            instruction.operands = tuple(by_id[n] for n in p.operand_ids)
            instruction.called = tuple(computations[n] for n in p.called_computation_ids)
            for callee in instruction.called:
                callee.callers.append(instruction)
            by_id[p.id] = instruction
            computation.instructions.append(instruction)
        computation.root = by_id[source.root_id]
    return Module(list(computations.values()), computations[message.entry_computation_id], message)


def _shape(p: Any) -> Shape:
    dtype, size = proto.dtype(p), proto.nbytes(p)
    if dtype == "tuple":
        return Shape(dtype, parts=tuple(_shape(part) for part in p.tuple_shapes), bytes=size)
    flags = p.is_dynamic_dimension or [d < 0 for d in p.dimensions]
    dynamic = tuple(axis for axis, flag in enumerate(flags) if flag)
    return Shape(dtype, tuple(p.dimensions), bytes=size, dynamic=dynamic)
