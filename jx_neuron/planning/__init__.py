"""Plans where a model fits and how fast it runs, before an instance is paid for and anything is compiled."""

from jx_neuron.planning.fleet import Fleet, Target, plan_fleet
from jx_neuron.planning.instances import INSTANCES, ULTRASERVERS, Instance, find
from jx_neuron.planning.load import Arrival, Load
from jx_neuron.planning.memory import Memory
from jx_neuron.planning.plan import Plan, check, padding_note, plan
from jx_neuron.planning.simulation import Service, Simulated, Spread, simulate
from jx_neuron.planning.step_times import Estimated, Measured, StepTimes

__all__ = [
    "INSTANCES",
    "ULTRASERVERS",
    "Arrival",
    "Estimated",
    "Fleet",
    "Instance",
    "Load",
    "Measured",
    "Memory",
    "Plan",
    "Service",
    "Simulated",
    "Spread",
    "StepTimes",
    "Target",
    "check",
    "find",
    "padding_note",
    "plan",
    "plan_fleet",
    "simulate",
]
