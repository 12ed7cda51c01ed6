"""Values of a program that are known before it runs: indices made of constants and iotas, and trip counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jx_neuron.lowering.hlo.graph import Computation, Instruction

Value = np.ndarray[Any, Any]
MAX_ELEMENTS = 2**20  # larger index tensors are not folded

_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FIELDS = {"b": "preds", "i": "s{}s", "u": "u{}s"}  # numpy kind -> a literal's field for it
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "negate": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "select": np.where,
    "subtract": np.subtract,
    "xor": np.bitwise_xor,
}


def fold(i: Instruction, memo: dict[Instruction, Value | None] | None = None) -> Value | None:
    """The value of an integer or boolean tensor that depends on no input, as XLA would compute it; else None.

    The opcodes of index arithmetic are covered.
    """
    memo = {} if memo is None else memo
    if i not in memo:
        memo[i] = None
        if i.shape.dtype in _DTYPES and i.shape.size <= MAX_ELEMENTS:
            with np.errstate(over="ignore"):
                memo[i] = _fold(i, memo)
    return memo[i]


def _fold(i: Instruction, memo: dict[Instruction, Value | None]) -> Value | None:
    dtype, dims, p = np.dtype(i.shape.dtype), i.shape.dims, i.proto
    match i.opcode:
        case "constant":
            return _literal(i, dtype).reshape(dims)
        case "iota":
            axis = p.dimensions[0]
            ramp = np.arange(dims[axis], dtype=dtype)
            return np.broadcast_to(ramp.reshape([-1 if n == axis else 1 for n in range(len(dims))]), dims)
        case "parameter":
            return fold(i.argument, memo) if i.argument else None
        case "call":
            return fold(i.called[0].root, memo)
    if i.opcode not in _MOVES and i.opcode not in _ELEMENTWISE and i.opcode not in ("compare", "concatenate"):
        return None
    values = []
    for operand in i.operands:
        value = fold(operand, memo)
        if value is None:
            return None
        values.append(value)
    if i.opcode in _MOVES:
        return _MOVES[i.opcode](i, values[0], dtype)
    if i.opcode == "concatenate":
        return np.concatenate(values, p.dimensions[0])
    operation = _COMPARE[p.comparison_direction] if i.opcode == "compare" else _ELEMENTWISE[i.opcode]
    return np.asarray(operation(*values), dtype)


def _broadcast(i: Instruction, x: Value, dtype: np.dtype[Any]) -> Value:
    dims = list(i.proto.dimensions)
    at = [i.shape.dims[n] if n in dims else 1 for n in range(len(i.shape.dims))]
    return np.broadcast_to(x.reshape(at), i.shape.dims)


_MOVES: dict[str, Callable[[Instruction, Value, np.dtype[Any]], Value]] = {
    "copy": lambda i, x, dtype: x,
    "bitcast": lambda i, x, dtype: x.reshape(i.shape.dims),
    "reshape": lambda i, x, dtype: x.reshape(i.shape.dims),
    "convert": lambda i, x, dtype: x.astype(dtype),
    "broadcast": _broadcast,
    "transpose": lambda i, x, dtype: x.transpose(list(i.proto.dimensions)),
    "reverse": lambda i, x, dtype: np.flip(x, tuple(i.proto.dimensions)),
    "slice": lambda i, x, dtype: x[tuple(slice(d.start, d.limit, d.stride or 1) for d in i.proto.slice_dimensions)],
}


def _literal(i: Instruction, dtype: np.dtype[Any]) -> Value:
    values = getattr(i.proto.literal, _FIELDS[dtype.kind].format(dtype.itemsize * 8))
    if isinstance(values, bytes):
        return np.frombuffer(values, dtype.newbyteorder("<"))
    return np.array(values, dtype)


def trip_count(loop: Instruction) -> int | None:
    """The trip count of a while loop whose counter starts, steps and ends at constants; else None."""
    body, condition = loop.called
    test = condition.root
    if test.opcode != "compare":
        return None
    direction = test.proto.comparison_direction
    left, right = test.operands
    for counter, bound, way in ((left, right, direction), (right, left, _FLIP.get(direction))):
        start, step = _initial(loop, condition, counter), _step(body, condition, counter)
        end = _scalar(bound)
        if end is None and _step(body, condition, bound) == 0:
            end = _initial(loop, condition, bound)
        if start is not None and step and end is not None:
            return _count(start, step, end, way)
    return None


_FLIP = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


def _count(start: int, step: int, end: int, direction: str | None) -> int | None:
    span = end - start
    if direction == "NE":
        return span // step if span % step == 0 and span // step >= 0 else None
    if direction in ("LE", "GE"):
        span += 1 if direction == "LE" else -1
    if (direction in ("LT", "LE")) != (step > 0) or direction not in _FLIP:
        return None
    return max(0, math.ceil(span / step))


def _scalar(i: Instruction) -> int | None:
    value = fold(i) if i.shape.size == 1 and i.shape.is_integer else None
    return None if value is None else int(value.reshape(()))


def _component(computation: Computation, i: Instruction) -> int | None:
    """The index of the part of a loop's state that an instruction of its body or condition reads unchanged."""
    while i.opcode in ("copy", "bitcast", "reshape"):
        i = i.operands[0]
    if i.opcode == "get-tuple-element" and i.operands[0].opcode == "parameter":
        return int(i.proto.tuple_index)
    return None


def _initial(loop: Instruction, condition: Computation, i: Instruction) -> int | None:
    n, state = _component(condition, i), loop.operands[0]
    return _scalar(state.operands[n]) if n is not None and state.opcode == "tuple" else None


def _step(body: Computation, condition: Computation, i: Instruction) -> int | None:
    """The constant that one iteration adds to a part of the loop's state; 0 where it is unchanged."""
    n = _component(condition, i)
    if n is None or body.root.opcode != "tuple":
        return None
    result = body.root.operands[n]
    if _component(body, result) == n:
        return 0
    if result.opcode not in ("add", "subtract"):
        return None
    left, right = result.operands
    if result.opcode == "add" and _component(body, right) == n:
        left, right = right, left
    by = _scalar(right)
    if _component(body, left) != n or by is None:
        return None
    return by if result.opcode == "add" else -by
