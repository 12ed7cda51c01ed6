"""Rules that check a program for what neuronx-cc is documented to refuse."""

from jx_neuron.lowering.verify.checking import RULES, Rule, Violation, verify

__all__ = ["RULES", "Rule", "Violation", "verify"]
