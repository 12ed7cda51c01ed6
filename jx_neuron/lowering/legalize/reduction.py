"""argmax and argmin, which JAX lowers to one reduce over values and indices, as two reduces over one tensor each."""

import math
from typing import Any

import numpy as np

from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.rewrite import Rewriter


def split_argreduce(rewriter: Rewriter, i: Any) -> None:
    """reduce(v, n) → best = max v, at = min(n where v is best or NaN): the first index wins, as in jnp.argmax.

    A reduce by any other reducer is kept unchanged.
    """
    values, indices, initial, _ = rewriter.operands(i)
    value_type, index_type = proto.dtype(values.shape), proto.dtype(indices.shape)
    reducer = next(c for c in rewriter.module.computations if c.id == i.called_computation_ids[0])
    opcode = _kind(reducer, is_float=np.dtype(value_type).kind not in "iub")
    if opcode is None or np.dtype(index_type).kind not in "iu":
        return
    result = i.shape.tuple_shapes
    kept_axes = [d for d in range(len(values.shape.dimensions)) if d not in i.dimensions]
    reduced_axes = list(i.dimensions)
    pred = proto.shape("bool", tuple(values.shape.dimensions))

    def reduce(operand: Any, start: Any, by: str, shape: Any) -> Any:
        region = reducer_of(rewriter.module, by, proto.dtype(operand.shape))
        return rewriter.emit(
            "reduce", shape, [operand, start], dimensions=reduced_axes, called_computation_ids=[region]
        )

    best = reduce(values, initial, opcode, result[0])
    spread = rewriter.emit("broadcast", values.shape, [best], dimensions=kept_axes)
    chosen = rewriter.emit("compare", pred, [values, spread], comparison_direction="EQ")
    if np.dtype(value_type).kind not in "iub":
        nan = rewriter.emit("compare", pred, [values, values], comparison_direction="NE")
        chosen = rewriter.emit("or", pred, [chosen, nan])
    last = rewriter.scalar(index_type, np.iinfo(index_type).max)
    candidates = rewriter.emit("select", indices.shape, [chosen, indices, rewriter.broadcast(last, indices.shape)])
    rewriter.become_tuple(i, [best, reduce(candidates, last, "minimum", result[1])])


def reducer_of(module: Any, opcode: str, dtype: str) -> int:
    """The id of the computation (a, b) → opcode(a, b) on scalars, added to the module where it is not there yet."""
    name = f"jx_neuron.{opcode}.{dtype}"
    for computation in module.computations:
        if computation.name == name:
            return int(computation.id)
    scalar = proto.shape(dtype, ())
    region = module.computations.add(name=name, id=1 + max(c.id for c in module.computations), root_id=3)
    for n in (0, 1):
        region.instructions.add(opcode="parameter", id=1 + n, parameter_number=n, shape=scalar)
    region.instructions.add(opcode=opcode, id=3, operand_ids=[1, 2], shape=scalar)
    region.program_shape.parameters.extend([scalar, scalar])
    region.program_shape.parameter_names.extend(["a", "b"])
    region.program_shape.result.CopyFrom(scalar)
    return int(region.id)


def _kind(reducer: Any, is_float: bool) -> str | None:
    """ "maximum" or "minimum" where the reducer, evaluated on examples, is an argmax or argmin; else None."""
    examples: list[tuple[float, ...]] = [
        (1, 0, 2, 1),
        (2, 0, 1, 1),
        (1, 1, 2, 0),
        (2, 1, 1, 0),
        (1, 0, 1, 1),
        (1, 1, 1, 0),
    ]
    if is_float:
        examples += [(math.nan, 0, 1, 1), (math.nan, 1, 1, 0), (1, 0, math.nan, 1)]
    results = [_evaluate(reducer, example) for example in examples]
    for opcode, better in (("maximum", max), ("minimum", min)):
        if results == [_first_best(example, better) for example in examples]:
            return opcode
    return None


def _first_best(example: tuple[float, ...], better: Any) -> tuple[Any, ...]:
    a, i, b, j = example
    if a == b:
        return (a, min(i, j))
    if math.isnan(a) or math.isnan(b):  # NaN is best
        return ("nan", i if math.isnan(a) else j)
    return (a, i) if better(a, b) == a else (b, j)


_COMPARE = {"EQ": "__eq__", "NE": "__ne__", "LT": "__lt__", "LE": "__le__", "GT": "__gt__", "GE": "__ge__"}


def _evaluate(reducer: Any, arguments: tuple[float, ...]) -> tuple[Any, ...] | None:
    values: dict[int, Any] = {}
    for i in reducer.instructions:
        x = [values[o] for o in i.operand_ids]
        match i.opcode:
            case "parameter":
                values[i.id] = float(arguments[i.parameter_number])
            case "compare":
                values[i.id] = getattr(x[0], _COMPARE[i.comparison_direction])(x[1])
            case "or":
                values[i.id] = x[0] or x[1]
            case "and":
                values[i.id] = x[0] and x[1]
            case "not":
                values[i.id] = not x[0]
            case "select":
                values[i.id] = x[1] if x[0] else x[2]
            case "tuple":
                values[i.id] = tuple("nan" if math.isnan(v) else v for v in x)
            case _:
                return None
    result: tuple[Any, ...] = values[reducer.root_id]
    return result
