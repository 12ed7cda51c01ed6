"""The cost of one run of a program on one core, computed from its HLO.

The model: chains of elementwise operators, reshapes and reductions are fused into their users and cost nothing.
Counted are:

- flops: 2 · (elements of the result) · (contracted size) of every dot, and the same of every convolution.
- bytes read: the part of each input that is read. A slice, dynamic-slice or gather reads as much as its result; each
  dot, convolution or collective reads the whole input, and all other uses together read it once. A scatter or
  dynamic-update-slice does not read the input that it updates. Its result is the same memory, so later uses of the
  result count as reads of the input.
- bytes written: outputs in full; of an output that aliases an input, only the updates written into it.
- bytes between: results of dots, convolutions and collectives, which may or may not stay on the chip.
- bytes moved: results of operators that only move values (copy, concatenate, pad, reverse, and transposes that move
  an axis longer than 1), whatever they fuse with.

The body of a loop counts as often as it runs, or once where that depends on data.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.fold import trip_count
from jx_neuron.lowering.hlo.graph import Computation, Instruction, Module, parse

_VIEWS = frozenset({"bitcast", "reshape", "transpose", "convert", "copy", "get-tuple-element", "tuple", "broadcast"})
_PARTS = frozenset({"slice", "dynamic-slice", "gather"})
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}  # opcode → which operand is the update
_HEAVY = frozenset({"dot", "convolution", *proto.COLLECTIVES})
_MOVES = frozenset({"copy", "concatenate", "pad", "reverse"})


@dataclass(frozen=True)
class Cost:
    """Flops and bytes of one run on one core. `instructions` counts those of the main computation."""

    flops: int
    bytes_read: int
    bytes_written: int
    bytes_between: int
    bytes_moved: int
    instructions: int


@dataclass(frozen=True)
class Collective:
    """One collective: its opcode, its result's shape and bytes on one core, and its replica groups."""

    name: str
    opcode: str
    shape: str
    bytes: int
    replica_groups: tuple[tuple[int, ...], ...]


def collectives(hlo_module: bytes) -> list[Collective]:
    """Every collective of a program, in order."""
    return [
        Collective(
            i.name, i.opcode, str(i.shape), i.shape.bytes, tuple(tuple(g.replica_ids) for g in i.proto.replica_groups)
        )
        for i in parse(hlo_module).instructions
        if i.opcode in proto.COLLECTIVES
    ]


def cost(hlo_module: bytes) -> Cost:
    """FLOPs and memory traffic of a program, by the model above."""
    module = parse(hlo_module)
    main, runs = module.entry, _runs(module)
    users: dict[Instruction, list[Instruction]] = {i: [] for i in module.instructions}
    for i in module.instructions:
        for operand in dict.fromkeys(i.operands):
            users[operand].append(i)

    def total(amounts: Iterable[tuple[Instruction, int]]) -> int:
        return sum(amount * runs[i.computation] for i, amount in amounts)

    heavy = [i for i in module.instructions if i.opcode in _HEAVY]
    return Cost(
        flops=total((i, _flops(i)) for i in heavy),
        bytes_read=sum(_bytes_read(p, users, runs) for p in main.parameters),
        bytes_written=_bytes_written(module),
        bytes_between=total((i, i.shape.bytes) for i in heavy),
        bytes_moved=total((i, i.shape.bytes) for i in module.instructions if _moves(i)),
        instructions=len(main.instructions),
    )


def _runs(module: Module) -> Counter[Computation]:
    """How often each computation runs; one that an operator applies to each element counts as often as the operator."""
    runs = Counter({module.entry: 1})
    for computation in reversed(module.computations):  # callers first
        for i in computation.instructions:
            for called in i.called:
                times = (trip_count(i) or 1) if i.opcode == "while" else 1
                runs[called] += times * runs[computation]
    return runs


def _flops(i: Instruction) -> int:
    if i.opcode == "dot":
        lhs = i.operands[0].shape
        contracted = math.prod(lhs.dims[d] for d in i.proto.dot_dimension_numbers.lhs_contracting_dimensions)
        return int(2 * i.shape.size * contracted)
    if i.opcode == "convolution":
        kernel = i.operands[1].shape
        outputs = kernel.dims[i.proto.convolution_dimension_numbers.kernel_output_feature_dimension]
        return int(2 * i.shape.size * kernel.size // outputs)
    return 0


def _bytes_read(parameter: Instruction, users: dict[Instruction, list[Instruction]], runs: Counter[Computation]) -> int:
    size, whole, parts, fused = parameter.shape.bytes, 0, 0, False
    for _, user, operand in _uses(parameter, users):
        times = runs[user.computation]
        if user.opcode in _PARTS and operand == 0:
            part = user.shape.size * parameter.shape.bytes // max(parameter.shape.size, 1)
            if times > 1:  # what a loop has read in one run is gone in the next
                whole += part * times
            else:
                parts += part
        elif user.opcode in _HEAVY:
            whole += size * times
        else:
            fused = True
    return whole + (size if fused else min(size, parts))


def _moves(i: Instruction) -> bool:
    if i.opcode == "transpose":
        order = [axis for axis in i.proto.dimensions if i.operands[0].shape.dims[axis] > 1]
        return order != sorted(order)
    return i.opcode in _MOVES


def _uses(
    memory: Instruction, users: dict[Instruction, list[Instruction]]
) -> Iterator[tuple[Instruction, Instruction, int]]:
    """(value, user, operand index) of every reader of a buffer, through its views, its in-place updates and loops that
    leave it as it is."""
    for user in users[memory]:
        at = user.operands.index(memory)
        if user.opcode == "tuple":
            for loop in (i for i in users[user] if i.opcode == "while"):
                body, _ = loop.called
                inside = [i for i in users[body.parameters[0]] if i.opcode == "get-tuple-element"]
                kept = [i for i in inside if i.proto.tuple_index == at and body.root.operands[at] is i]
                for part in kept:
                    yield from _uses(part, users)
                if not kept:
                    yield memory, loop, 0
        elif user.opcode in _VIEWS or (user.opcode in _UPDATES and at == 0):
            yield from _uses(user, users)
        else:
            yield memory, user, at


def _bytes_written(module: Module) -> int:
    root, aliased = module.entry.root, set(module.aliases.values())
    outputs = root.operands if root.opcode == "tuple" else (root,)
    return sum(_bytes_updated(o) if n in aliased else o.shape.bytes for n, o in enumerate(outputs))


def _bytes_updated(i: Instruction) -> int:
    """Bytes written between a parameter and the output that aliases it."""
    if i.opcode in _UPDATES:
        return i.operands[_UPDATES[i.opcode]].shape.bytes + _bytes_updated(i.operands[0])
    if i.opcode == "parameter":
        return 0
    if i.opcode in ("bitcast", "reshape"):
        return _bytes_updated(i.operands[0])
    return i.shape.bytes
