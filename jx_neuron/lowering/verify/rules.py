"""Targets, the registry of rules, and helpers that several rules share.

The other modules of this package hold the rules. Codes, limits and lists are from the Neuron compiler's error code
pages (SDK 2.32) and from the JAX on Neuron known issues:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/compiler/error-codes/
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/jax/setup/jax-neuronx-known-issues.html
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from jx_neuron.errors import LoweringError
from jx_neuron.lowering.hlo.graph import Instruction, Module

Severity = Literal["error", "warning"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Target:
    """A `--target` of neuronx-cc at one logical-core configuration (LNC).

    Attributes:
        generation: NeuronCore version: 2 for inf2 and trn1, 3 for trn2, 4 for trn3.
        lnc: physical cores that make one logical core.
        lnc_choices: what the hardware allows for `lnc`; the last is the default.
        hbm_bytes: device memory of one logical core.
    """

    name: str
    generation: int
    lnc: int
    lnc_choices: tuple[int, ...]
    hbm_bytes: int


# name: generation, LNC choices, HBM bytes per physical core
TARGETS = {
    "inf2": (2, (1,), 16 * GIB),
    "trn1": (2, (1,), 16 * GIB),
    "trn1n": (2, (1,), 16 * GIB),
    "trn2": (3, (1, 2), 12 * GIB),
    "trn3": (4, (1, 2), 18 * GIB),
}


def target_of(name: str, lnc: int | None = None) -> Target:
    """The target of that name; `lnc` None takes neuronx-cc's default for it.

    >>> target_of("trn2").lnc, target_of("trn2", 1).hbm_bytes // GIB
    (2, 12)

    Raises:
        LoweringError: no target has that name.
    """
    if name not in TARGETS:
        raise LoweringError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    generation, choices, hbm = TARGETS[name]
    lnc = choices[-1] if lnc is None else lnc
    return Target(name, generation, lnc, choices, hbm * lnc)


# An instruction (None: the module as a whole), and what is wrong with it.
Finding = tuple[Instruction | None, str]
Check = Callable[[Module, Target], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint on a program.

    Attributes:
        name: this package's name for it, stable across releases.
        codes: the Neuron compiler's codes for it without their `NCC_`, the likeliest first; empty where the
            constraint is documented without a code.
        title: one line.
        advice: what to do instead.
        severity: a program with an error does not compile or runs wrongly; one with a warning may.
        doc: why, and what exactly is checked.
    """

    name: str
    codes: tuple[str, ...]
    title: str
    advice: str
    severity: Severity
    doc: str
    check: Check

    @property
    def code(self) -> str | None:
        """The rule's first code; None where neuronx-cc documents none."""
        return self.codes[0] if self.codes else None


RULES: dict[str, Rule] = {}


def module_rule(
    name: str, *codes: str, title: str, advice: str, severity: Severity = "error"
) -> Callable[[Check], Check]:
    """Registers `check(module, target)`, which yields (instruction or None, message) pairs."""

    def register(check: Check) -> Check:
        RULES[name] = Rule(name, codes, title, advice, severity, inspect.getdoc(check) or "", check)
        return check

    return register


def rule(
    name: str, *codes: str, ops: Iterable[str] = (), title: str, advice: str, severity: Severity = "error"
) -> Callable[[Callable[[Instruction, Target], str | None]], Callable[[Instruction, Target], str | None]]:
    """Registers `check(instruction, target)`, which returns what is wrong, or None.

    It is called with each instruction whose opcode is in `ops`, or with all where that is empty.
    """
    opcodes = frozenset(ops)

    def register(
        check: Callable[[Instruction, Target], str | None],
    ) -> Callable[[Instruction, Target], str | None]:
        def over_module(module: Module, target: Target) -> Iterator[Finding]:
            for instruction in module.instructions:
                if not opcodes or instruction.opcode in opcodes:
                    message = check(instruction, target)
                    if message:
                        yield instruction, message

        over_module.__doc__ = check.__doc__
        module_rule(name, *codes, title=title, advice=advice, severity=severity)(over_module)
        return check

    return register


def strip(i: Instruction, opcodes: Iterable[str] = ("broadcast", "copy", "convert", "reshape")) -> Instruction:
    """The instruction behind a chain of one-operand `opcodes` and of parameters of calls."""
    while True:
        if i.opcode in opcodes:
            i = i.operands[0]
        elif i.argument is not None:
            i = i.argument
        else:
            return i


def is_top_k(instruction: Instruction) -> bool:
    """Whether an instruction is XLA's own top-k or Neuron's."""
    return instruction.opcode == "topk" or bool(instruction.proto.custom_call_target == "AwsNeuronTopK")
