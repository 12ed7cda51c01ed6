"""Rules on operators: control flow, host transfers, reductions, sorts, top-k, custom calls, RNG."""

from __future__ import annotations

from jx_neuron.lowering.hlo.fold import trip_count
from jx_neuron.lowering.hlo.graph import Instruction
from jx_neuron.lowering.verify.rules import Target, is_top_k, rule

MAX_K = 16384
TOP_K = ("topk", "custom-call")

# The targets that neuronx-cc recognizes, from the page of EVRF015.
CUSTOM_CALLS = frozenset(
    """
    AwsNeuronErf AwsNeuronGelu AwsNeuronGeluApprxTanh AwsNeuronGeluBackward
    AwsNeuronSilu AwsNeuronSiluBackward
    AwsNeuronRmsNorm AwsNeuronSoftmax AwsNeuronSoftmaxBackward AwsNeuronCollectiveMatmul AwsNeuronIntMatmult
    AwsNeuronArgMax AwsNeuronArgMin AwsNeuronTopK AwsNeuronDropoutMaskV1 AwsNeuronCustomNativeKernel
    AwsNeuronCustomOp AwsNeuronDevicePrint ResizeNearest ResizeBilinear ResizeNearestGrad
    AwsNeuronLNCShardingConstraint AwsNeuronTransferWithStaticRing AwsNeuronModuleMarkerStart-Forward
    AwsNeuronModuleMarkerStart-Backward AwsNeuronModuleMarkerEnd-Forward AwsNeuronModuleMarkerEnd-Backward
    NeuronBoundaryMarker-Start NeuronBoundaryMarker-End
    """.split()
)
UNSUPPORTED = (
    "cholesky", "domain", "dynamic-reshape", "fft", "ragged-all-to-all", "ragged-dot", "set-dimension-size",
    "stochastic-convert", "topk", "triangular-solve",
)  # fmt: skip
_HOST = ("infeed", "outfeed", "send", "send-done", "recv", "recv-done")


@rule(
    "operator", "EVRF001", "EUOC002",
    ops=UNSUPPORTED,
    title="An operator that Neuron does not have",
    advice="write it with those of `neuronx-cc list-operators --framework XLA`; legalization turns lax.top_k"
    " into the custom call AwsNeuronTopK",
)  # fmt: skip
def operator(i: Instruction, target: Target) -> str | None:
    """FFT, Cholesky, triangular solve, ragged operations, operators on dynamic shapes, and XLA's own `topk`.
    The list is of those known to be refused; neuronx-cc has the last word on what it takes."""
    return f"is the operator {i.opcode}"


@rule(
    "conditional",
    ops=["conditional"],
    title="Control flow that depends on data",
    advice="compute both branches and choose with jnp.where, or compile two programs",
)  # fmt: skip
def conditional(i: Instruction, target: Target) -> str | None:
    """No code is documented: lax.cond and lax.switch are listed as not supported."""
    return f"chooses among {len(i.called)} computations at run time"


@rule(
    "dynamic-while",
    ops=["while"],
    title="A loop without a static trip count",
    advice="loop a fixed number of times (lax.fori_loop or lax.scan) and mask, or loop on the host",
)  # fmt: skip
def dynamic_while(i: Instruction, target: Target) -> str | None:
    """No code is documented: only static while loops are supported. A trip count is static where the
    condition compares a counter, stepped by a constant from a constant, with a constant."""
    return None if trip_count(i) is not None else "loops until a condition that depends on data"


@rule(
    "host-callback",
    ops=["custom-call", *_HOST],
    title="The program talks to the host",
    advice="take jax.debug.print, pure_callback and io_callback out; return the value as an output instead",
)  # fmt: skip
def host_callback(i: Instruction, target: Target) -> str | None:
    """No code is documented: host callbacks are listed as not supported. Found by their custom call targets
    (`xla_ffi_python_cpu_callback` and the like), and as infeed, outfeed, send and recv."""
    if i.opcode in _HOST:
        return f"is the host transfer {i.opcode}"
    called = i.proto.custom_call_target
    return f"calls back to the host through {called!r}" if "callback" in called else None


@rule(
    "reduce-precision",
    ops=["reduce-precision"],
    title="lax.reduce_precision is used",
    advice="convert to the narrower type and back",
)  # fmt: skip
def reduce_precision(i: Instruction, target: Target) -> str | None:
    """No code is documented: jax.lax.reduce_precision is listed as not supported."""
    return f"reduces the precision of {i.shape}"


@rule(
    "variadic-reduce",
    ops=["reduce"],
    title="A reduction over several tensors at once",
    advice="split it; an argmax is a max, a comparison and a min over an iota",
)  # fmt: skip
def variadic_reduce(i: Instruction, target: Target) -> str | None:
    """No code is documented: reduce is supported for one tensor and one start value. jnp.argmax and
    jnp.argmin lower to a reduce of values and indices."""
    return f"reduces {len(i.operands) // 2} tensors at once" if len(i.operands) > 2 else None


@rule(
    "sort-comparator",
    ops=["sort"],
    title="A sort with an unusual comparator",
    advice="sort by one key with <, <=, > or >=",
)  # fmt: skip
def sort_comparator(i: Instruction, target: Target) -> str | None:
    """No code is documented: jax.lax.sort is supported with LE, GE, LT and GT. The comparator's result has to
    be such a comparison; one over several keys is a chain of them."""
    root = i.called[0].root
    if root.opcode == "compare" and root.proto.comparison_direction in ("LE", "GE", "LT", "GT"):
        return None
    comparator = f"compare {root.proto.comparison_direction}" if root.opcode == "compare" else root.opcode
    return f"orders by {comparator}"


@rule(
    "sort", "EVRF029",
    ops=["sort"],
    title="A sort on trn2 or later",
    advice="use lax.top_k (AwsNeuronTopK once legalized), or sort on the host",
)  # fmt: skip
def sort(i: Instruction, target: Target) -> str | None:
    """The code has no page; users report of trn2 and trn3 that "operation sort is not supported"."""
    return f"sorts {i.shape}, which {target.name} cannot" if target.generation >= 3 else None


@rule(
    "top-k-integer", "EVRF013",
    ops=TOP_K,
    title="Top-k of integers",
    advice="cast to float32 first",
)  # fmt: skip
def top_k_integer(i: Instruction, target: Target) -> str | None:
    """Top-k takes floating-point tensors only."""
    if not is_top_k(i) or i.operands[0].shape.is_float:
        return None
    return f"takes the top k of {i.operands[0].shape}"


@rule(
    "top-k-size", "EVRF014",
    ops=TOP_K,
    title="Top-k with k above 16384",
    advice=f"ask for at most {MAX_K}, or take the top k of parts of the tensor first",
)  # fmt: skip
def top_k_size(i: Instruction, target: Target) -> str | None:
    """At most 16384 values can be asked of one top-k."""
    if not is_top_k(i):
        return None
    k = next(i.shape.leaves()).dims[-1]
    return f"asks for the top {k} of {i.operands[0].shape}" if k > MAX_K else None


@rule(
    "top-k-axis",
    ops=TOP_K,
    title="Top-k over another dimension than the last",
    advice="move the dimension to the end with jnp.moveaxis first",
)  # fmt: skip
def top_k_axis(i: Instruction, target: Target) -> str | None:
    """No code is documented: top-k runs over the last dimension, and gives values and indices of the same
    leading dimensions."""
    if not is_top_k(i):
        return None
    operand_dims = i.operands[0].shape.dims
    sound = all(leaf.dims[:-1] == operand_dims[:-1] and leaf.dims[-1] <= operand_dims[-1] for leaf in i.shape.leaves())
    return None if sound else f"gives {i.shape} from {i.operands[0].shape}"


@rule(
    "custom-call", "EVRF015", "EHCA005",
    ops=["custom-call"],
    title="A custom call that neuronx-cc does not know",
    advice="use a target of the documented list; partition the module first if this annotates"
    " sharding, and keep library calls (LAPACK, cuBLAS) on the host",
)  # fmt: skip
def custom_call(i: Instruction, target: Target) -> str | None:
    """Targets outside the documented list (`CUSTOM_CALLS`) are refused. Host callbacks have a rule of their
    own."""
    called = i.proto.custom_call_target
    return None if called in CUSTOM_CALLS or "callback" in called else f"calls {called!r}"


@rule(
    "rng-algorithm", "EVRF006",
    ops=["rng-bit-generator"],
    title="A named random number algorithm",
    advice='use jax.config.update("jax_default_prng_impl", "rbg"), or take random numbers as inputs',
)  # fmt: skip
def rng_algorithm(i: Instruction, target: Target) -> str | None:
    """rng-bit-generator is supported with the algorithm RNG_DEFAULT only."""
    names = {1: "three-fry", 2: "philox"}
    number = i.proto.rng_algorithm
    return f"asks for the algorithm {names.get(number, number)}" if number else None
