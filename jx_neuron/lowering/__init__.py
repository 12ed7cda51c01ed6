"""From a JAX function to what neuronx-cc compiles: trace, partition, legalize, verify."""

from jx_neuron.lowering.cost import Collective, Cost
from jx_neuron.lowering.execute import Executable
from jx_neuron.lowering.program import Program, Traced, compile_py_func, lower, lower_many, trace
from jx_neuron.lowering.specs import TensorSpec

__all__ = [
    "Collective",
    "Cost",
    "Executable",
    "Program",
    "TensorSpec",
    "Traced",
    "compile_py_func",
    "lower",
    "lower_many",
    "trace",
]
