"""all_reduce(x) · s → all_reduce(x · s): products of codes are scaled on each core, and their sum is one collective.

s is a parameter that every core has whole, or rows of one, so each core multiplies its part by the same numbers.
Conversions of the scaled sum to fewer bytes go with it: what is reduced is rounded, as it is where nothing is scaled.
"""

from collections import Counter
from typing import Any

from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.rewrite import Rewriter

_MOVES = ("bitcast", "broadcast", "convert", "gather", "reshape", "transpose")


def scale_before_all_reduces(module: Any, computation: Any, whole: frozenset[int]) -> None:
    """Moves products with parameters, or rows of them, before the all-reduces whose only use they are.

    whole: the parameters that are the same on every core, by number.
    """
    if not any(i.opcode == "all-reduce" for i in computation.instructions):
        return
    uses = Counter(o for i in computation.instructions for o in i.operand_ids)
    uses[computation.root_id] += 1
    scaled: dict[int, int] = {}  # an all-reduce that was moved → uses of what it replaces
    same = _same_on_every_core(computation, whole)
    adders = _Adders(module)

    def is_whole(rewriter: Rewriter, i: Any) -> bool:
        if i.id not in same:
            return False
        while i.opcode in _MOVES:
            i = rewriter.operands(i)[0]
        return bool(i.opcode == "parameter")

    def reduced(rewriter: Rewriter, i: Any) -> tuple[Any, list[Any]] | None:
        """The all-reduce that `i` is, converted and reshaped, and these instructions; the last comes first."""
        chain = []
        while uses[i.id] == 1 and i.opcode in ("bitcast", "convert", "reshape"):
            chain.append(i)
            (i,) = rewriter.operands(i)
        is_sum = i.opcode == "all-reduce" and len(i.operand_ids) == 1 and adders.adds(i)
        return (i, chain) if is_sum and uses[i.id] == 1 else None

    def move(rewriter: Rewriter, i: Any) -> None:
        if i.opcode == "multiply":
            for x, factor in (rewriter.operands(i), rewriter.operands(i)[::-1]):
                if is_whole(rewriter, factor) and (match := reduced(rewriter, x)):
                    collective, chain = match
                    (part,) = rewriter.operands(collective)
                    for link in reversed(chain):
                        part = rewriter.emit(link.opcode, link.shape, [part], like=link)
                    emit(rewriter, i, rewriter.emit("multiply", i.shape, [part, factor]), collective)
                    return
        elif i.opcode == "convert":
            (collective,) = rewriter.operands(i)
            if scaled.get(collective.id) == 1 and proto.nbytes(i.shape) < proto.nbytes(collective.shape):
                emit(rewriter, i, rewriter.emit("convert", i.shape, rewriter.operands(collective)), collective)

    def emit(rewriter: Rewriter, old: Any, part: Any, like: Any) -> None:
        new = rewriter.emit("all-reduce", old.shape, [part], like=like)
        new.called_computation_ids[:] = [adders.of(like, old.shape)]
        scaled[new.id] = uses[old.id]
        rewriter.replace(old, new)

    Rewriter(module, computation).run(move)


def _same_on_every_core(computation: Any, whole: frozenset[int]) -> set[int]:
    """The instructions that compute the same on every core, by id: of such operands, and without other computations."""
    same = set[int]()
    for i in computation.instructions:
        if i.opcode == "parameter":
            is_same = i.parameter_number in whole
        elif i.operand_ids:
            is_same = (
                i.opcode not in proto.COLLECTIVES and not i.called_computation_ids and same.issuperset(i.operand_ids)
            )
        else:
            is_same = i.opcode in ("constant", "iota")
        if is_same:
            same.add(i.id)
    return same


class _Adders:
    """The computations of a module that add two scalars, one a type."""

    def __init__(self, module: Any):
        self._module = module
        self._by_id = {c.id: c for c in module.computations}

    def adds(self, collective: Any) -> bool:
        body = self._by_id[collective.called_computation_ids[0]]
        return [i.opcode for i in body.instructions if i.opcode != "parameter"] == ["add"]

    def of(self, collective: Any, shape: Any) -> int:
        """That of an all-reduce of `shape`, which is otherwise `collective`."""
        like = self._by_id[collective.called_computation_ids[0]]
        if like.program_shape.result.element_type == shape.element_type:
            return int(like.id)
        new = proto.Computation()
        new.CopyFrom(like)
        new.id = 1 + max(self._by_id)
        new.name = f"{like.name}.{new.id}"
        for one in (new.program_shape.result, *new.program_shape.parameters, *(i.shape for i in new.instructions)):
            one.element_type = shape.element_type
        self._module.computations.append(new)
        self._by_id[new.id] = new
        return int(new.id)
