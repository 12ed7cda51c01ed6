"""all_reduce(x) + all_reduce(y) → all_reduce(x + y): one collective where a parallel residual would make two."""

from collections import Counter
from typing import Any

from jx_neuron.lowering.hlo.rewrite import Rewriter


def merge_all_reduces(module: Any, computation: Any) -> None:
    """Merges the terms of each sum that are all-reduces over the same groups and have no other use."""
    if not any(i.opcode == "all-reduce" for i in computation.instructions):
        return
    uses = Counter(o for i in computation.instructions for o in i.operand_ids)
    uses[computation.root_id] += 1
    users = {o: i for i in computation.instructions for o in i.operand_ids}
    sums = {c.id: [i.opcode for i in c.instructions if i.opcode != "parameter"] == ["add"] for c in module.computations}

    def inner(i: Any) -> bool:
        """Whether an add is a partial sum: its only use is a larger sum."""
        return i.opcode == "add" and uses[i.id] == 1 and i.id in users and users[i.id].opcode == "add"

    def merge(rewriter: Rewriter, i: Any) -> None:
        if i.opcode != "add" or inner(i):
            return
        terms, stack = [], [i]
        while stack:
            term = stack.pop()
            if term is i or inner(term):
                stack += reversed(rewriter.operands(term))
            else:
                terms.append(term)
        alike: dict[bytes, list[Any]] = {}
        for term in terms:
            if term.opcode == "all-reduce" and uses[term.id] == 1 and sums[term.called_computation_ids[0]]:
                alike.setdefault(term.collective_device_list.SerializeToString(), []).append(term)
        merged = [group for group in alike.values() if len(group) > 1]
        if not merged:
            return

        def total(parts: list[Any]) -> Any:
            value = parts[0]
            for part in parts[1:]:
                value = rewriter.emit("add", i.shape, [value, part])
            return value

        reduced = []
        for group in merged:
            partial = total([rewriter.operands(term)[0] for term in group])
            reduced.append(rewriter.emit("all-reduce", i.shape, [partial], like=group[0]))
        gone = {term.id for group in merged for term in group}
        rewriter.replace(i, total([t for t in terms if t.id not in gone] + reduced))

    Rewriter(module, computation).run(merge)
