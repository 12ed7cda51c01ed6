"""Rewriting one HLO computation: a forward pass in which a rule keeps, replaces, or expands each instruction."""

from collections.abc import Callable, Iterable
from typing import Any

from jx_neuron.lowering.hlo import proto


class Rewriter:
    """Rewrites the instructions of a computation in order.

    `emit` adds an instruction before the current one; `replace` redirects later users of one to another.
    """

    def __init__(self, module: Any, computation: Any) -> None:
        self.module, self.computation = module, computation
        self.by_id: dict[int, Any] = {}
        self._order: list[Any] = []
        self._replaced: dict[int, int] = {}
        self._next = 1 + max(i.id for i in computation.instructions)
        self._at: Any = None

    def run(self, rule: Callable[["Rewriter", Any], None]) -> None:
        """Applies the rule to every instruction, then drops the dead ones."""
        for instruction in list(self.computation.instructions):
            self._at = instruction
            self._resolve(instruction)
            rule(self, instruction)
            if instruction.id not in self._replaced:
                self._order.append(instruction)
                self.by_id[instruction.id] = instruction
        self.computation.root_id = self._final(self.computation.root_id)
        self._commit()

    def operands(self, instruction: Any) -> list[Any]:
        return [self.by_id[o] for o in instruction.operand_ids]

    def emit(self, opcode: str, shape: Any, operands: Iterable[Any] = (), like: Any = None, **fields: Any) -> Any:
        """Adds an instruction, with the other fields of `like` and the source of the current instruction."""
        new = proto.Instruction()
        if like is not None:
            new.CopyFrom(like)
        new.metadata.CopyFrom(self._at.metadata)
        new.id, new.opcode, new.name = self._next, opcode, f"{opcode}.{self._next}"
        new.shape.CopyFrom(shape)
        del new.operand_ids[:]
        new.operand_ids.extend(o.id for o in operands)
        for name, value in fields.items():
            if isinstance(value, list | tuple):
                getattr(new, name).extend(value)
            else:
                setattr(new, name, value)
        self._next += 1
        self._order.append(new)
        self.by_id[new.id] = new
        return new

    def scalar(self, dtype: str, value: float) -> Any:
        """A constant of no dimensions."""
        new = self.emit("constant", proto.shape(dtype, ()))
        new.literal.CopyFrom(proto.scalar_literal(dtype, value))
        return new

    def broadcast(self, scalar: Any, shape: Any) -> Any:
        return self.emit("broadcast", shape, [scalar])

    def replace(self, old: Any, new: Any) -> None:
        self._replaced[old.id] = new.id

    def become_tuple(self, instruction: Any, elements: list[Any]) -> None:
        """Turns a tuple-shaped instruction into the tuple of these elements."""
        identity = (instruction.id, instruction.name)
        metadata = proto.Instruction(metadata=instruction.metadata).metadata
        instruction.Clear()
        instruction.id, instruction.name = identity
        instruction.opcode = "tuple"
        instruction.metadata.CopyFrom(metadata)
        instruction.shape.CopyFrom(proto.tuple_shape([e.shape for e in elements]))
        instruction.operand_ids.extend(e.id for e in elements)

    def _final(self, identity: int) -> int:
        while identity in self._replaced:
            identity = self._replaced[identity]
        return identity

    def _resolve(self, instruction: Any) -> None:
        for ids in (instruction.operand_ids, instruction.control_predecessor_ids):
            ids[:] = [self._final(i) for i in ids]

    def _commit(self) -> None:
        live_ids, stack = set[int](), [self.computation.root_id]
        stack += [i.id for i in self._order if i.custom_call_has_side_effect or i.opcode in _KEPT]
        while stack:
            identity = stack.pop()
            if identity not in live_ids:
                live_ids.add(identity)
                stack += [*self.by_id[identity].operand_ids, *self.by_id[identity].control_predecessor_ids]
        live = [i for i in self._order if i.id in live_ids]
        fresh = proto.Computation(instructions=live)
        self.computation.ClearField("instructions")
        self.computation.MergeFrom(fresh)


_KEPT = frozenset({"parameter", "infeed", "outfeed", "send", "send-done", "recv", "recv-done"})


def inline_calls(module: Any) -> None:
    """Inlines every call."""
    bodies = {c.id: c for c in module.computations}

    def inline(rewriter: Rewriter, instruction: Any) -> None:
        if instruction.opcode == "call":
            body = bodies[instruction.called_computation_ids[0]]
            rewriter.replace(instruction, _inlined(rewriter, bodies, body, rewriter.operands(instruction)))

    for computation in module.computations:
        if any(i.opcode == "call" for i in computation.instructions):
            Rewriter(module, computation).run(inline)


def _inlined(rewriter: Rewriter, bodies: dict[int, Any], body: Any, arguments: list[Any]) -> Any:
    values: dict[int, Any] = {}
    for i in body.instructions:
        operands = [values[o] for o in i.operand_ids]
        if i.opcode == "parameter":
            values[i.id] = arguments[i.parameter_number]
        elif i.opcode == "call":
            values[i.id] = _inlined(rewriter, bodies, bodies[i.called_computation_ids[0]], operands)
        else:
            values[i.id] = rewriter.emit(i.opcode, i.shape, operands, like=i)
            if (
                i.metadata.stack_frame_id
            ):  # without one it was traced once for several calls, and the call's source is better
                values[i.id].metadata.CopyFrom(i.metadata)
    return values[body.root_id]
