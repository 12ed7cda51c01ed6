"""Plans where a model fits and how fast it runs, before an instance is paid for and anything is compiled."""

from jx_neuron.planning.instances import INSTANCES, Instance, find
from jx_neuron.planning.memory import Memory
from jx_neuron.planning.plan import Plan, check, padding_note, plan

__all__ = ["INSTANCES", "Instance", "Memory", "Plan", "check", "find", "padding_note", "plan"]
