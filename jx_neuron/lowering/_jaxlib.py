"""Every use of jaxlib's internals. Tested with jaxlib 0.8.0, 0.9.0 and 0.10.2.

Run as a script, this module partitions one program (see `partition.py`) and imports jaxlib and numpy alone. XLA aborts
its process when an internal check fails, and that must not be the user's.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxlib import _jax, xla_client

try:
    from jaxlib._hlo import XlaComputation
except ImportError:  # jaxlib < 0.10
    from jaxlib._jax import XlaComputation

# The passes up to partitioned HLO. Later passes generate CPU code, which is not needed.
_PASSES = (
    "call-inliner,control-dep-rewriter,cse,dce,flatten-call-graph,sharding-remover,shardy-xla,spmd-partitioning,"
    "tuple-simplifier,zero_sized_hlo_elimination"
)


@functools.cache
def client(devices: int) -> Any:
    """A separate CPU client with that many devices, however many JAX's own has; started once."""
    return _jax.get_tfrt_cpu_client(asynchronous=True, num_devices=devices)


def processes() -> int:
    """How many processes `jax.distributed` has joined; no backend is started."""
    from jax._src import distributed

    return int(distributed.global_state.num_processes or 1)


def unpartitioned_hlo(stablehlo: bytes) -> bytes:
    """An HloModuleProto of a StableHLO module, unpartitioned."""
    computation = _jax.mlir.mlir_module_to_xla_computation(stablehlo, use_tuple_args=False, return_tuple=False)
    data: bytes = computation.as_serialized_hlo_module_proto()
    return data


def hlo_text(hlo: bytes) -> str:
    """XLA's text of an HloModuleProto."""
    text: str = XlaComputation(hlo).as_hlo_text()
    return text


def _options(replicas: int, partitions: int, debug: dict[str, Any]) -> Any:
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = replicas, partitions
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.arange(replicas * partitions).reshape(replicas, partitions)
    )
    options.executable_build_options.use_spmd_partitioning = partitions > 1
    options.executable_build_options.use_shardy_partitioner = partitions > 1
    options.env_option_overrides = list(debug.items())
    return options


def _compile(program: bytes | str, options: Any) -> Any:
    devices = client(options.num_replicas * options.num_partitions).devices()
    return client(len(devices)).compile_and_load(program, _jax.DeviceList(tuple(devices)), options)


def compile_replicas(hlo: bytes, replicas: int) -> Any:
    """A loaded executable of an HloModuleProto, one replica on each device of `client(replicas)`.

    It rounds 16-bit results where the program says so.
    """
    module = _jax.mlir.xla_computation_to_mlir_module(XlaComputation(hlo))
    return _compile(module, _options(replicas, 1, {"xla_allow_excess_precision": False}))


def execute(executable: Any, arguments: Sequence[Any]) -> list[list[Any]]:
    """Runs an executable on arrays with one shard a device. Returns the shards of each output; donated arguments
    are deleted."""
    shards: list[list[Any]] = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    return shards


def dump_partitioned(stablehlo: bytes, partitions: int, folder: str) -> None:
    """Compiles for that many partitions and dumps the module after each pass into `folder`."""
    debug = {
        "xla_dump_to": folder,
        "xla_dump_hlo_as_proto": True,
        "xla_dump_hlo_pass_re": "spmd-partitioning|call-inliner",
        "xla_enable_hlo_passes_only": _PASSES,
    }
    _compile(stablehlo, _options(1, partitions, debug))


if __name__ == "__main__":
    source, count, destination = sys.argv[1:]
    dump_partitioned(Path(source).read_bytes(), int(count), destination)
