"""Checks a program against the documented limits of the Neuron compiler, before it is compiled.

    for violation in verify(hlo_module, "trn1"):
        print(violation)

`RULES` holds every rule with its codes, its documentation and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from jx_neuron.lowering.hlo.graph import parse
from jx_neuron.lowering.verify import index as rules_index
from jx_neuron.lowering.verify import integers as rules_integers
from jx_neuron.lowering.verify import operators as rules_ops
from jx_neuron.lowering.verify import program as rules_program
from jx_neuron.lowering.verify import types as rules_types
from jx_neuron.lowering.verify import windows as rules_windows
from jx_neuron.lowering.verify.rules import RULES, Rule, Severity, target_of

__all__ = ["RULES", "Rule", "Violation", "verify"]

RULE_MODULES = (rules_types, rules_ops, rules_integers, rules_windows, rules_index, rules_program)


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that one instruction, or the module as a whole, breaks.

    Attributes:
        code: the Neuron compiler's code without its `NCC_`; None where the constraint is documented without.
        rule: the rule's name, a key of `RULES`.
        instruction: the HLO instruction's name; None for the module as a whole.
        source: `file:line` (or the JAX name) that the instruction came from, where known.
        message: what is wrong.
        advice: what to do instead.
        severity: "error" or "warning".
    """

    code: str | None
    rule: str
    instruction: str | None
    source: str | None
    message: str
    advice: str
    severity: Severity = "error"

    def __str__(self) -> str:
        label = f"{self.severity} NCC_{self.code} ({self.rule})" if self.code else f"{self.severity} ({self.rule})"
        subject = f"%{self.instruction}" if self.instruction else "the program"
        source = f" [{self.source}]" if self.source else ""
        return f"{label}: {subject} {self.message}{source}. Instead: {self.advice}."

    def as_dict(self) -> dict[str, str | None]:
        """The same, for JSON."""
        return asdict(self)


def verify(
    hlo_module: bytes, target: str, *, lnc: int | None = None, sources: Mapping[str, str] | None = None
) -> list[Violation]:
    """Every violation of a program, in the order of `RULES` and then of its instructions.

    Args:
        hlo_module: a serialized HloModuleProto, the program of one core.
        target: inf2, trn1, trn1n, trn2 or trn3.
        lnc: physical cores to a logical core; None takes the target's default.
        sources: instruction name -> source, for a module whose metadata was stripped.

    Raises:
        LoweringError: the bytes are no HLO module, or no target has that name.
    """
    resolved_target, module = target_of(target, lnc), parse(hlo_module)
    sources = sources or {}
    return [
        Violation(
            rule.code,
            rule.name,
            instruction.name if instruction else None,
            module.source(instruction) or sources.get(instruction.name) if instruction else None,
            message,
            rule.advice,
            rule.severity,
        )
        for rule in RULES.values()
        for instruction, message in rule.check(module, resolved_target)
    ]
