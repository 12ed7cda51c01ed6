"""Running a legalized program on the host: one replica a core, each on its own virtual CPU device."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.errors import InputError, LoweringError
from jx_neuron.lowering import _jaxlib
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.rewrite import Rewriter
from jx_neuron.lowering.legalize.passes import TOP_K
from jx_neuron.nn.sharding import AXIS


class Executable:
    """A legalized program, compiled for `tp_degree` CPU devices of a client of this package: JAX may have fewer.

    Arrays stay on those devices between calls. Inputs that the program aliases to outputs are donated.

    Attributes:
        mesh: the devices, along the axis "tp".
        inputs: (shape, dtype) of each parameter on one core.

    Raises:
        LoweringError: the bytes are no HLO module, or hold what a CPU cannot run.
    """

    def __init__(self, hlo_module: bytes, tp_degree: int) -> None:
        module = proto.parse(hlo_module)
        for computation in list(module.computations):
            Rewriter(module, computation).run(_expand)
        shapes = [i.shape for i in proto.parameters(proto.entry(module))]
        self.inputs = [(tuple(s.dimensions), np.dtype(proto.dtype(s))) for s in shapes]
        self.mesh = Mesh(np.array(_jaxlib.client(tp_degree).devices()), (AXIS,))
        self._everywhere = self.sharding(())
        try:
            self._loaded = _jaxlib.compile_replicas(proto.serialize(module), tp_degree)
        except Exception as error:
            raise LoweringError(f"the program {module.name!r} cannot run on the host: {error}") from error

    def sharding(self, partition: Sequence[str | None]) -> NamedSharding:
        """The sharding of an array that is split along these axes, for `jax.device_put`."""
        return NamedSharding(self.mesh, PartitionSpec(*partition))

    def put(self, ranks: Sequence[Any]) -> jax.Array:
        """Places one array a core, in rank order, as one argument. Only the shards of the result are meaningful."""
        devices = self.mesh.devices.tolist()
        if len(ranks) != len(devices):
            raise InputError(f"{len(ranks)} arrays given for {len(devices)} cores: give one a core, in rank order")
        shards = [
            array if getattr(array, "device", None) == device else jax.device_put(array, device)
            for array, device in zip(ranks, devices, strict=True)
        ]
        placed: jax.Array = jax.make_array_from_single_device_arrays(shards[0].shape, self._everywhere, shards)
        return placed

    def execute(self, args: Sequence[jax.Array | Sequence[Any]]) -> list[list[jax.Array]]:
        """Runs the program.

        Args:
            args: for each input either an array placed by `put` or by `jax.device_put` with `sharding`, or a list of
                one array a core.

        Returns:
            For each output a list of its arrays, one a core. They may not be computed yet.

        Raises:
            InputError: an argument is not what the program takes.
        """
        arrays = [arg if isinstance(arg, jax.Array) else self.put(arg) for arg in args]
        signature = [(a.sharding.shard_shape(a.shape), a.dtype) for a in arrays]
        if signature != self.inputs:
            raise InputError(_difference(signature, self.inputs))
        return _jaxlib.execute(self._loaded, arrays)


def _difference(signature: list[Any], expected: list[Any]) -> str:
    if len(signature) != len(expected):
        return f"{len(signature)} arguments given: the program takes {len(expected)}"
    n = next(n for n, (a, b) in enumerate(zip(signature, expected, strict=True)) if a != b)
    (shape, dtype), (expected_shape, expected_dtype) = signature[n], expected[n]
    return (
        f"argument {n} is {dtype}{list(shape)} on each core: the program takes {expected_dtype}{list(expected_shape)}"
    )


def _expand(rewriter: Rewriter, i: Any) -> None:
    """Replaces the Neuron custom calls that lowering emits by the XLA operators that they stand for."""
    if i.opcode != "custom-call" or not i.custom_call_target.startswith(("AwsNeuron", "Resize", "NeuronBoundary")):
        return
    if i.custom_call_target != TOP_K:
        raise LoweringError(f"the custom call {i.custom_call_target} runs on Neuron only: the host knows {TOP_K}")
    values, indices = i.shape.tuple_shapes
    signed = proto.shape("int32", tuple(indices.dimensions))
    top = rewriter.emit(
        "topk", proto.tuple_shape([values, signed]), rewriter.operands(i), k=int(i.backend_config), largest=True
    )
    at = rewriter.emit("get-tuple-element", signed, [top], tuple_index=1)
    best = rewriter.emit("get-tuple-element", values, [top], tuple_index=0)
    rewriter.become_tuple(i, [best, rewriter.emit("convert", indices, [at])])
