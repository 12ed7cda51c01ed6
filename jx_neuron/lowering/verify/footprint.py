"""Lower bounds of a program's memory and engine instructions."""

from __future__ import annotations

import math

from jx_neuron.lowering.hlo.fold import trip_count
from jx_neuron.lowering.hlo.graph import Computation, Instruction, Module
from jx_neuron.lowering.hlo.proto import COLLECTIVES

# Opcodes that do not fuse with their users, so that their results are in memory whole.
_MATERIALIZED = {
    *COLLECTIVES, "concatenate", "convolution", "custom-call", "dot", "gather", "reduce-window",
    "sort", "topk",
}  # fmt: skip
_VIEWS = {"bitcast", "get-tuple-element", "reshape"}
_FREE = {*_VIEWS, "broadcast", "constant", "iota", "parameter", "tuple"}
_RUN = {"call", "conditional", "while"}  # whose computations run as programs, not as element functions


def resident_bytes(module: Module) -> int:
    """Bytes of inputs, of outputs that share no input's buffer, and of constants."""
    root, aliased = module.entry.root, set(module.aliases.values())
    outputs = root.shape.parts if root.shape.dtype == "tuple" else (root.shape,)
    fresh = sum(shape.bytes for n, shape in enumerate(outputs) if n not in aliased)
    constants = sum(i.shape.bytes for i in module.instructions if i.opcode == "constant")
    return sum(p.shape.bytes for p in module.entry.parameters) + fresh + constants


def peak_bytes(computation: Computation) -> int:
    """The largest sum of materialized intermediate results that are live at one time, in program order.

    In-place updates (dynamic-update-slice, scatter) and outputs take no memory of their own.
    """
    order = {i: n for n, i in enumerate(computation.instructions)}
    base: dict[Instruction, Instruction] = {}
    last: dict[Instruction, int] = {}
    for i, n in order.items():
        base[i] = base[i.operands[0]] if i.opcode in _VIEWS and i.operands else i
        for operand in i.operands:
            last[base[operand]] = n
    root = computation.root
    outputs = {base[i] for i in (root.operands if root.opcode == "tuple" else (root,))}
    frees: dict[int, int] = {}
    live = peak = 0
    for i, n in order.items():
        inside = max((peak_bytes(c) for c in i.called), default=0) if i.opcode in _RUN else 0
        if i.opcode in _MATERIALIZED and i not in outputs:
            live += i.shape.bytes
            end = last.get(i, n)
            frees[end] = frees.get(end, 0) + i.shape.bytes
        peak = max(peak, live + inside)
        live -= frees.pop(n, 0)
    return peak


def engine_instructions(computation: Computation) -> int:
    """An estimate of a program's engine instructions, its loops unrolled (a dynamic one counted once)."""
    total = 0
    for i in computation.instructions:
        if i.opcode == "while":
            body = engine_instructions(i.called[0])
            turns = trip_count(i)
            total += body * (1 if turns is None else turns)
        elif i.opcode in _RUN:
            total += sum(engine_instructions(c) for c in i.called)
        elif i.opcode == "dot":
            total += _dot_tiles(i)
        elif i.opcode not in _FREE:
            total += max(1, math.ceil(sum(leaf.size for leaf in i.shape.leaves()) / (128 * 512)))
    return total


def _dot_tiles(i: Instruction) -> int:
    """Tiles of 128 (contracted) x 128 (stationary) x 512 (moving), the better way round."""
    lhs, rhs, n = i.operands[0].shape, i.operands[1].shape, i.proto.dot_dimension_numbers
    batch = math.prod(lhs.dims[d] for d in n.lhs_batch_dimensions)
    contracted = math.prod(lhs.dims[d] for d in n.lhs_contracting_dimensions)
    rows = lhs.size // max(batch * contracted, 1)
    columns = rhs.size // max(batch * contracted, 1)
    tiles = min(math.ceil(a / 128) * math.ceil(b / 512) for a, b in ((rows, columns), (columns, rows)))
    return int(batch * math.ceil(contracted / 128) * tiles)
