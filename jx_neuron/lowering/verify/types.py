"""Rules on shapes, element types and constants."""

from __future__ import annotations

from collections.abc import Iterator

from jx_neuron.lowering.hlo.graph import Instruction, Module, Shape
from jx_neuron.lowering.hlo.shapes import shape_fault
from jx_neuron.lowering.verify.rules import Finding, Target, module_rule, rule, strip

FNUZ = {"float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz"}
UNSUPPORTED = {"float64", "float4_e2m1fn", "int4", "uint4", "int2", "uint2", "unknown"}
_WIDER = "cast to bfloat16 or float16, or store the tensor as float8_e4m3 or float8_e5m2"


def _leaf_of_type(instruction: Instruction, dtypes: set[str]) -> Shape | None:
    return next((leaf for leaf in instruction.shape.leaves() if leaf.dtype in dtypes), None)


@rule(
    "dynamic-shape", "EMOD025",
    title="A dimension is not static",
    advice="compile one program per bucket of sizes, and pad inputs to it",
)  # fmt: skip
def dynamic_shape(i: Instruction, target: Target) -> str | None:
    """Every dimension of every tensor must be known at compile time; bounded dynamic dimensions are refused
    too."""
    return f"has the dynamic shape {i.shape}" if any(leaf.dynamic for leaf in i.shape.leaves()) else None


@rule(
    "invalid-shape", "EVRF064",
    title="A shape does not follow from its operands",
    advice="the module is malformed: fix the pass or tool that wrote this instruction",
)  # fmt: skip
def invalid_shape(i: Instruction, target: Target) -> str | None:
    """neuronx-cc runs XLA's HLO verifier first, and it refuses an instruction whose result shape is not what
    its operands and attributes give. Checked here for element-wise operations, data movement, dot, reduce,
    calls and loops, tuples and the common collectives."""
    return shape_fault(i)


@rule(
    "complex", "EVRF004",
    title="A complex type is used",
    advice="carry real and imaginary parts as two real tensors",
)  # fmt: skip
def complex_type(i: Instruction, target: Target) -> str | None:
    """No Neuron device computes with complex64 or complex128. Rotary embeddings, the usual culprit, are a
    rotation of two real halves."""
    leaf = _leaf_of_type(i, {"complex64", "complex128"})
    return f"makes a complex tensor, {leaf}" if leaf else None


@rule(
    "fnuz", "EVRF005",
    title="An FNUZ 8-bit float is used",
    advice=_WIDER,
)  # fmt: skip
def fnuz(i: Instruction, target: Target) -> str | None:
    """float8_e4m3fnuz, float8_e4m3b11fnuz and float8_e5m2fnuz exist on no Neuron device."""
    leaf = _leaf_of_type(i, FNUZ)
    return f"makes a tensor of type {leaf}" if leaf else None


@rule(
    "f8e4m3fn", "EVRF051",
    title="float8_e4m3fn is used before trn3",
    advice="use float8_e4m3 with values within ±240, or bfloat16, or target trn3",
)  # fmt: skip
def f8e4m3fn(i: Instruction, target: Target) -> str | None:
    """float8_e4m3fn (±448, no infinities) is native to trn3; the others have float8_e4m3 (±240)."""
    leaf = _leaf_of_type(i, {"float8_e4m3fn"}) if target.generation < 4 else None
    return f"makes a tensor of type {leaf}, which {target.name} does not have" if leaf else None


@rule(
    "fp8", "ESPP047",
    title="An 8-bit float other than float8_e4m3 and float8_e5m2 is used",
    advice=_WIDER,
)  # fmt: skip
def other_fp8(i: Instruction, target: Target) -> str | None:
    """float8_e3m4 and float8_e8m0fnu. (The FNUZ types and float8_e4m3fn have codes of their own.)"""
    leaf = _leaf_of_type(i, {"float8_e3m4", "float8_e8m0fnu"})
    return f"makes a tensor of type {leaf}" if leaf else None


@rule(
    "unsupported-type", "ESPP004",
    title="A type that no code is generated for",
    advice="use float32 for float64 (mind NumPy scalars under jax_enable_x64); hold 4-bit weights in int8",
)  # fmt: skip
def unsupported_type(i: Instruction, target: Target) -> str | None:
    """float64, and types of fewer than 8 bits. The page of this code shows float4; "f64 dtype is not
    supported" is what users report."""
    leaf = _leaf_of_type(i, UNSUPPORTED)
    return f"makes a tensor of type {leaf}" if leaf else None


@rule(
    "u64-constant", "ESFH002",
    ops=["constant"],
    title="A 64-bit unsigned constant does not fit 32 bits",
    advice="use uint32, or compute the value from smaller ones",
)  # fmt: skip
def u64_constant(i: Instruction, target: Target) -> str | None:
    """64-bit integers are narrowed to 32 bits; a u64 constant above 4294967295 cannot be."""
    largest = max(i.proto.literal.u64s, default=0)
    return f"holds {largest}, more than 4294967295" if largest > 2**32 - 1 else None


@module_rule(
    "infinite-mask",
    title="An infinite value is selected into a tensor",
    advice="mask with the finite minimum of the type, jnp.finfo(dtype).min",
    severity="warning",
)  # fmt: skip
def infinite_mask(module: Module, target: Target) -> Iterator[Finding]:
    """No code is documented. Masks of -inf turn into NaN where a row is masked whole, and engines saturate
    infinities (`--enable-saturate-infinity`). Selects between a tensor and an infinite constant are reported;
    the infinite start value of a max or min is not."""
    for i in module.instructions:
        if i.opcode == "select" and i.shape.is_float:
            for operand in i.operands[1:]:
                if _is_infinite(strip(operand)):
                    yield i, f"selects an infinite constant into {i.shape}"


def _is_infinite(i: Instruction) -> bool:
    if i.opcode != "constant" or i.shape.size != 1:
        return False
    literal = i.proto.literal
    if i.shape.dtype in ("bfloat16", "float16"):
        exponent = 0x7F80 if i.shape.dtype == "bfloat16" else 0x7C00
        return int.from_bytes(literal.bf16s or literal.f16s, "little") & 0x7FFF == exponent
    return list(literal.f32s or literal.f64s) in ([float("inf")], [float("-inf")])
