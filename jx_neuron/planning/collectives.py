"""Counts the all-reduces of a layer in the traced decoder. Nothing is lowered, and no backend starts.

A matmul whose contracted axis is split gives each core a partial sum. Partial sums that are added before they are
reduced, as in a parallel residual, need one all-reduce together (legalize/reassociate.py does so). It is counted where
any other operator reads the sum.
"""

from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend.core import Jaxpr, Literal

from jx_neuron.checkpoint.weights import Params
from jx_neuron.models import Decoder
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.state import State, positions_of

_ADDS = frozenset({"add", "add_any"})
_VIEWS = frozenset(
    "convert_element_type copy dynamic_slice gather optimization_barrier reshape slice squeeze transpose".split()
)


class _Mark(NamedTuple):
    """Whether an array is a kernel whose input axis is split, and which partial sums it holds."""

    kernel: bool = False
    partial: frozenset[int] = frozenset()


def all_reduces(decoder: Decoder) -> float:
    """All-reduces of a layer in a decode step; the mean where layers differ."""

    def hidden_states(params: Params, tokens_bt: Array, state: State, start_b: Array) -> Array:
        return decoder.bind(params)(tokens_bt, state, positions_of(start_b, start_b + 1, None, 1, 2))[0]

    params, state = decoder.abstract_params("float32"), decoder.abstract_state(1, 2, "float32")
    tokens_bt, start_b = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((1, 1), (1,)))
    closed = jax.make_jaxpr(hidden_states)(params, tokens_bt, state, start_b)
    row_parallel = {
        row.target
        for row in decoder.rows
        if row.letters[-1] == "d" and row.letters[0] != "v" and AXIS in row.partition  # [*inputs, d], and no table
    }
    marks = [_Mark(path in row_parallel) for path in sorted(params)]
    marks += [_Mark()] * (len(closed.jaxpr.invars) - len(marks))
    count = _Count()
    count.reduce(count.through(closed.jaxpr, marks))
    return count.all_reduces / decoder.config.layers


class _Count:
    def __init__(self) -> None:
        self.all_reduces = self.sums = 0
        self.reduced: set[int] = set()

    def reduce(self, marks: list[_Mark]) -> None:
        """Counts an all-reduce for each array that holds partial sums not yet reduced."""
        for mark in marks:
            if due := mark.partial - self.reduced:
                self.all_reduces += 1
                self.reduced |= due

    def through(self, jaxpr: Jaxpr, marks: list[_Mark]) -> list[_Mark]:
        """The marks of a jaxpr's outputs, given those of its inputs."""
        mark_by_variable: dict[Any, _Mark] = dict(zip(jaxpr.invars, marks, strict=True))

        def marks_of(atoms: Any) -> list[_Mark]:
            return [_Mark() if isinstance(atom, Literal) else mark_by_variable.get(atom, _Mark()) for atom in atoms]

        for equation in jaxpr.eqns:
            results = self._results(equation, marks_of(equation.invars))
            mark_by_variable |= zip(equation.outvars, results, strict=True)
        return marks_of(jaxpr.outvars)

    def _results(self, equation: Any, marks: list[_Mark]) -> list[_Mark]:
        name, outputs = equation.primitive.name, len(equation.outvars)
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None and len(inner.jaxpr.invars) == len(marks):
            return self.through(inner.jaxpr, marks)
        partial = frozenset[int]().union(*(mark.partial for mark in marks))
        if name in _ADDS:
            return [_Mark(partial=partial)]
        if name in _VIEWS:
            return [_Mark(any(mark.kernel for mark in marks), partial)] * outputs
        self.reduce(marks)
        if name == "dot_general" and any(mark.kernel for mark in marks):
            self.sums += 1
            return [_Mark(partial=frozenset({self.sums}))]
        return [_Mark()] * outputs
