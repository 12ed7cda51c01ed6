"""Rules on integer arithmetic, much of which Neuron does in floating point."""

from __future__ import annotations

from jx_neuron.lowering.hlo.graph import Instruction, Shape
from jx_neuron.lowering.verify.rules import Target, rule

WORD, LONG = ("int32", "uint32"), ("int64", "uint64")
_DOWNCAST = (
    "cast to float32 (exact up to 2^24), or allow the loss with neuronx-cc's --implicit-integer-downcast={}, "
    "as SDK 2.32 still does by default"
)


def _wide_integer(shape: Shape) -> Shape | None:
    return next((leaf for leaf in shape.leaves() if leaf.dtype in WORD + LONG), None)


@rule(
    "integer-dot", "EVRF035",
    ops=["dot"],
    title="A matrix product of integers",
    advice=_DOWNCAST.format("dot"),
)  # fmt: skip
def integer_dot(i: Instruction, target: Target) -> str | None:
    """Matrix products run in floating point: 64-bit integers are refused everywhere, 32-bit ones on trn2 and
    later."""
    wide = [o.shape for o in i.operands if o.shape.dtype in LONG]
    if target.generation >= 3:
        wide += [o.shape for o in i.operands if o.shape.dtype in WORD]
    return f"multiplies matrices of {wide[0].dtype}" if wide else None


@rule(
    "integer-dot-lossy", "EVRF035",
    ops=["dot"],
    title="A matrix product of 32-bit integers on inf2 or trn1",
    advice="cast to float32 (exact up to 2^24): trn2 and later refuse it",
    severity="warning",
)  # fmt: skip
def integer_dot_lossy(i: Instruction, target: Target) -> str | None:
    """NeuronCore-v2 takes 32-bit integer matrix products, with a warning."""
    narrow = [o.shape for o in i.operands if o.shape.dtype in WORD]
    return f"multiplies matrices of {narrow[0].dtype}" if narrow and target.generation == 2 else None


def _combiner(i: Instruction) -> str:
    """The opcode that combines old and new in a scatter; "parameter" where new replaces old."""
    return i.called[0].root.opcode


@rule(
    "integer-scatter", "EVRF060",
    ops=["scatter"],
    title="A scatter that adds (or the like) 32- or 64-bit integers",
    advice=_DOWNCAST.format("scatter"),
)  # fmt: skip
def integer_scatter(i: Instruction, target: Target) -> str | None:
    """A scatter that combines computes in float32. One that only overwrites (`.at[].set`) is fine for
    integers."""
    wide = _wide_integer(i.shape)
    return f"combines {wide} by {_combiner(i)}" if wide and _combiner(i) != "parameter" else None


@rule(
    "narrow-scatter", "EVRF016",
    ops=["scatter"],
    title="A scatter that combines booleans or narrow integers",
    advice="cast operand and updates to float32 or bfloat16",
)  # fmt: skip
def narrow_scatter(i: Instruction, target: Target) -> str | None:
    """The same of booleans and of integers of 8 and 16 bits."""
    narrow = [x for x in i.shape.leaves() if (x.is_integer or x.dtype == "bool") and not _wide_integer(x)]
    return f"combines {narrow[0]} by {_combiner(i)}" if narrow and _combiner(i) != "parameter" else None


@rule(
    "integer-all-reduce", "EVRF061",
    ops=["all-reduce", "all-reduce-start"],
    title="An all-reduce of integers",
    advice=_DOWNCAST.format("all_reduce"),
)  # fmt: skip
def integer_all_reduce(i: Instruction, target: Target) -> str | None:
    """Collectives reduce in float32, which is exact for integers up to 2^24 only."""
    wide = _wide_integer(i.shape)
    return f"reduces {wide} over cores" if wide else None


@rule(
    "integer-reduce-scatter", "EVRF063",
    ops=["reduce-scatter"],
    title="A reduce-scatter of integers",
    advice=_DOWNCAST.format("reduce_scatter"),
)  # fmt: skip
def integer_reduce_scatter(i: Instruction, target: Target) -> str | None:
    """As for all-reduce."""
    wide = _wide_integer(i.shape)
    return f"reduces {wide} over cores" if wide else None


@rule(
    "integer-power", "EVRF062",
    ops=["power"],
    title="A power of 64-bit integers",
    advice="use int32, or allow the loss with neuronx-cc's --implicit-integer-downcast=pow",
)  # fmt: skip
def integer_power(i: Instruction, target: Target) -> str | None:
    """64-bit powers would be narrowed to 32 bits."""
    return f"raises {i.shape} to a power" if i.shape.dtype in LONG else None


@rule(
    "arithmetic-shift", "EVRF022",
    ops=["shift-right-arithmetic"],
    title="An arithmetic right shift of other than 32 bits",
    advice="cast to int32, shift, and cast back",
)  # fmt: skip
def arithmetic_shift(i: Instruction, target: Target) -> str | None:
    """The tensor that is shifted has to be int32 or uint32."""
    return None if i.shape.dtype in WORD else f"shifts {i.shape} right"
