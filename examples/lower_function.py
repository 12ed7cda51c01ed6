"""Lowering a JAX function: what its cores say to each other, what it costs, what it computes, and its bytes.

    python examples/lower_function.py --tp 4 --output mlp.hlo.pb
    jx-neuron check mlp.hlo.pb --target trn1

The function is plain JAX. Shardings are separate arguments. Lowering needs no device, no compiler and no values.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jx_neuron.lowering import lower


def mlp(x_td, w_in_df, w_out_fd):
    """A gated layer with a residual, as of a transformer."""
    return x_td + jax.nn.gelu(x_td @ w_in_df) @ w_out_fd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=4, help="cores (%(default)s)")
    parser.add_argument("--target", default="trn1", help="inf2, trn1, trn1n, trn2 or trn3 (%(default)s)")
    parser.add_argument("--output", type=Path, help="file for the serialized HloModuleProto")
    asked = parser.parse_args()

    # Shapes are those of the whole arrays. The MLP's width is split over "tp": columns of the first matrix, rows of the
    # second, so that each core has a partial sum of every output and one all-reduce adds them up.
    t, d, f = 16, 256, 1024
    x = jax.ShapeDtypeStruct((t, d), jnp.float32)
    w_in, w_out = jax.ShapeDtypeStruct((d, f), jnp.float32), jax.ShapeDtypeStruct((f, d), jnp.float32)
    program = lower(
        mlp, x, w_in, w_out, tp_degree=asked.tp, in_specs=(P(), P(None, "tp"), P("tp", None)), out_specs=P()
    )

    for spec in program.inputs:
        print(f"{spec.name}: {spec.dtype}{list(spec.shape)} on each core, of {list(spec.global_shape(asked.tp))}")
    for collective in program.collectives():
        print(f"{collective.opcode} of {collective.shape} among {collective.replica_groups}")
    cost = program.cost()
    print(f"{cost.instructions} instructions, of which `program.as_text()` has the HLO")
    print(f"each core: {cost.flops:,} FLOPs, {cost.bytes_read:,} bytes read, {cost.bytes_between:,} passed around")

    # What neuronx-cc is documented to refuse, by its error codes, before it is asked.
    violations = program.verify(asked.target)
    print(f"{asked.target}:", *(violations or ["passes"]), sep="\n  ")

    # The very program, as replicas on host devices, against numpy.
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=of.shape, scale=0.1).astype(np.float32) for of in (x, w_in, w_out)]
    (found,) = program.run(*arrays)
    difference = np.abs(found - np.asarray(mlp(*arrays))).max()
    print(f"largest difference from jax itself: {difference:.1e}")

    # The same input gives the same bytes, so that a compiler's results can be kept by their hash.
    if asked.output:
        asked.output.write_bytes(program.hlo_module)
        print(f"{len(program.hlo_module)} bytes in {asked.output}")


if __name__ == "__main__":
    main()
