"""HLO's shape rules, of the opcodes that are checked.

Reference: https://openxla.org/xla/operation_semantics
"""

from __future__ import annotations

from collections.abc import Callable

from jx_neuron.lowering.hlo.graph import Instruction, Shape

_ELEMENTWISE = """
    abs cbrt ceil copy cosine count-leading-zeros erf exponential exponential-minus-one floor log log-plus-one
    logistic negate not popcnt round-nearest-afz round-nearest-even rsqrt sign sine sqrt tan tanh
    add and atan2 divide maximum minimum multiply or power remainder shift-left shift-right-arithmetic
    shift-right-logical subtract xor
"""


def shape_fault(i: Instruction) -> str | None:
    """The fault of an instruction's shape, or None. Opcodes without a rule here pass."""
    check = _RULES.get(i.opcode)
    if check is None:
        return None
    try:
        sound = check(i, [o.shape for o in i.operands])
    except (IndexError, ValueError):
        sound = False
    if sound:
        return None
    operand_shapes = ", ".join(str(o.shape) for o in i.operands)
    return f"has the shape {i.shape}, which {i.opcode} does not give for ({operand_shapes})"


def _array(shape: Shape) -> tuple[str, tuple[int, ...]]:
    return shape.dtype, shape.dims


def _elementwise(i: Instruction, s: list[Shape]) -> bool:
    if i.opcode == "abs" and s[0].dtype in ("complex64", "complex128"):
        return i.shape.dims == s[0].dims
    return all(_array(shape) == _array(i.shape) for shape in s)


def _compare(i: Instruction, s: list[Shape]) -> bool:
    return i.shape.dtype == "bool" and _array(s[0]) == _array(s[1]) and i.shape.dims == s[0].dims


def _select(i: Instruction, s: list[Shape]) -> bool:
    if s[1].dtype == "tuple":
        return s[1] == s[2] == i.shape
    return s[0].dtype == "bool" and s[0].dims in ((), i.shape.dims) and _array(s[1]) == _array(s[2]) == _array(i.shape)


def _clamp(i: Instruction, s: list[Shape]) -> bool:
    bounds = all(b.dtype == i.shape.dtype and b.dims in ((), i.shape.dims) for b in (s[0], s[2]))
    return bounds and _array(s[1]) == _array(i.shape)


def _transpose(i: Instruction, s: list[Shape]) -> bool:
    order = list(i.proto.dimensions)
    return sorted(order) == list(range(len(s[0].dims))) and i.shape.dims == tuple(s[0].dims[d] for d in order)


def _broadcast(i: Instruction, s: list[Shape]) -> bool:
    dims = list(i.proto.dimensions)
    return i.shape.dtype == s[0].dtype and tuple(i.shape.dims[d] for d in dims) == s[0].dims


def _without(dims: tuple[int, ...], *dropped: int) -> tuple[int, ...]:
    return tuple(d for n, d in enumerate(dims) if n not in dropped)


def _concatenate(i: Instruction, s: list[Shape]) -> bool:
    axis = i.proto.dimensions[0]
    rest = all(x.dtype == i.shape.dtype and _without(x.dims, axis) == _without(i.shape.dims, axis) for x in s)
    return rest and i.shape.dims[axis] == sum(x.dims[axis] for x in s)


def _slice(i: Instruction, s: list[Shape]) -> bool:
    spans = [(d.start, d.limit, d.stride or 1) for d in i.proto.slice_dimensions]
    within = len(spans) == len(s[0].dims) and all(
        0 <= a <= b <= n for (a, b, _), n in zip(spans, s[0].dims, strict=True)
    )
    return within and i.shape.dims == tuple(-(-(b - a) // step) for a, b, step in spans)


def _dynamic_slice(i: Instruction, s: list[Shape]) -> bool:
    sizes = tuple(i.proto.dynamic_slice_sizes)
    return i.shape.dims == sizes and all(n <= m for n, m in zip(sizes, s[0].dims, strict=True))


def _dynamic_update_slice(i: Instruction, s: list[Shape]) -> bool:
    within = all(n <= m for n, m in zip(s[1].dims, s[0].dims, strict=True))
    return within and s[0].dtype == s[1].dtype and _array(s[0]) == _array(i.shape)


def _dot(i: Instruction, s: list[Shape]) -> bool:
    n, (lhs, rhs) = i.proto.dot_dimension_numbers, (s[0].dims, s[1].dims)
    lhs_bound = [*n.lhs_batch_dimensions, *n.lhs_contracting_dimensions]
    rhs_bound = [*n.rhs_batch_dimensions, *n.rhs_contracting_dimensions]
    batch = tuple(lhs[d] for d in n.lhs_batch_dimensions)
    agree = [lhs[d] for d in lhs_bound] == [rhs[d] for d in rhs_bound]
    return agree and i.shape.dims == batch + _without(lhs, *lhs_bound) + _without(rhs, *rhs_bound)


def _reduce(i: Instruction, s: list[Shape]) -> bool:
    dims = _without(s[0].dims, *i.proto.dimensions)
    return all(leaf.dims == dims for leaf in i.shape.leaves())


def _all_gather(i: Instruction, s: list[Shape]) -> bool:
    axis, results = i.proto.dimensions[0], list(i.shape.leaves())
    return all(
        _without(r.dims, axis) == _without(x.dims, axis) and r.dims[axis] % max(x.dims[axis], 1) == 0
        for r, x in zip(results, s, strict=True)
    )


def _all_reduce(i: Instruction, s: list[Shape]) -> bool:
    return [_array(r) for r in i.shape.leaves()] == [_array(x) for x in s]


def _arrays(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    return [_array(leaf) for leaf in shape.leaves()]


def _call(i: Instruction, s: list[Shape]) -> bool:
    parameters = [p.shape for p in i.called[0].parameters]
    takes = [_arrays(p) for p in parameters] == [_arrays(x) for x in s]
    return takes and _arrays(i.called[0].root.shape) == _arrays(i.shape)


def _while(i: Instruction, s: list[Shape]) -> bool:
    body, condition = i.called
    states = (s[0], body.parameters[0].shape, body.root.shape, condition.parameters[0].shape)
    return all(_arrays(x) == _arrays(i.shape) for x in states) and _array(condition.root.shape) == (
        "bool",
        (),
    )


_RULES: dict[str, Callable[[Instruction, list[Shape]], bool]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    "compare": _compare,
    "select": _select,
    "clamp": _clamp,
    "convert": lambda i, s: i.shape.dims == s[0].dims,
    "reshape": lambda i, s: i.shape.dtype == s[0].dtype and i.shape.size == s[0].size,
    "transpose": _transpose,
    "broadcast": _broadcast,
    "concatenate": _concatenate,
    "slice": _slice,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _dynamic_update_slice,
    "dot": _dot,
    "reduce": _reduce,
    "all-gather": _all_gather,
    "all-reduce": _all_reduce,
    "call": _call,
    "while": _while,
    "tuple": lambda i, s: [leaf for x in s for leaf in _arrays(x)] == _arrays(i.shape),
    "get-tuple-element": lambda i, s: _arrays(s[0].parts[i.proto.tuple_index]) == _arrays(i.shape),
}
