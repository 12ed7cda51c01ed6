"""What neuronx-cc is documented to refuse, checked rule by rule."""

from jx_neuron.lowering.verify.checking import RULES, Rule, Violation, verify

__all__ = ["RULES", "Rule", "Violation", "verify"]
