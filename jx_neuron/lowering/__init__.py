"""From a JAX function to what neuronx-cc compiles: trace, partition, legalize, verify."""

from typing import TYPE_CHECKING

from jx_neuron.util.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "cost": "Collective Cost",
        "execute": "Executable",
        "program": "Program Traced compile_py_func lower lower_many trace",
        "signature": "ProgramSpec TensorSpec",
    },
)

if TYPE_CHECKING:
    from jx_neuron.lowering.cost import Collective, Cost  # noqa: F401
    from jx_neuron.lowering.execute import Executable  # noqa: F401
    from jx_neuron.lowering.program import Program, Traced, compile_py_func, lower, lower_many, trace  # noqa: F401
    from jx_neuron.lowering.signature import ProgramSpec, TensorSpec  # noqa: F401
