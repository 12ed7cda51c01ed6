"""Rules on convolutions and reduce-windows."""

from __future__ import annotations

from jx_neuron.lowering.hlo.graph import Instruction
from jx_neuron.lowering.verify.rules import Target, rule


@rule(
    "convolution-dilation", "EVRF010",
    ops=["convolution"],
    title="A convolution that dilates both input and kernel",
    advice="use one of lhs_dilation and rhs_dilation, and do the other with lax.pad",
)  # fmt: skip
def convolution_dilation(i: Instruction, target: Target) -> str | None:
    """Input (base) and kernel (window) dilation exclude one another."""
    window = i.proto.window.dimensions
    both = any(d.base_dilation > 1 for d in window) and any(d.window_dilation > 1 for d in window)
    return "dilates both its input and its kernel" if both else None


@rule(
    "convolution-stride", "EVRF011",
    ops=["convolution"],
    title="A strided convolution of a dilated input",
    advice="do the upsampling and the downsampling in two steps",
)  # fmt: skip
def convolution_stride(i: Instruction, target: Target) -> str | None:
    """Strides and input (base) dilation exclude one another."""
    window = i.proto.window.dimensions
    both = any(d.base_dilation > 1 for d in window) and any(d.stride > 1 for d in window)
    return "has both strides and a dilated input" if both else None


@rule(
    "reduce-window-base-dilation", "EVRF017",
    ops=["reduce-window"],
    title="A reduce-window that dilates its input",
    advice="dilate with lax.pad first",
)  # fmt: skip
def reduce_window_base_dilation(i: Instruction, target: Target) -> str | None:
    """base_dilation has to be 1 in every dimension."""
    dilation = [d.base_dilation for d in i.proto.window.dimensions]
    return f"has the base dilation {dilation}" if any(d > 1 for d in dilation) else None


@rule(
    "reduce-window-dilation", "EVRF018",
    ops=["reduce-window"],
    title="A reduce-window with a dilated window",
    advice="take strided slices and reduce those",
)  # fmt: skip
def reduce_window_dilation(i: Instruction, target: Target) -> str | None:
    """window_dilation has to be 1 in every dimension."""
    dilation = [d.window_dilation for d in i.proto.window.dimensions]
    return f"has the window dilation {dilation}" if any(d > 1 for d in dilation) else None


@rule(
    "reduce-window-operands", "EVRF019",
    ops=["reduce-window"],
    title="A reduce-window over several tensors at once",
    advice="split it into one reduce-window a tensor",
)  # fmt: skip
def reduce_window_operands(i: Instruction, target: Target) -> str | None:
    """It takes one tensor and one start value. (jnp.cumsum and the like are reduce-windows on some
    backends.)"""
    return f"has {len(i.operands)} operands, not 2" if len(i.operands) != 2 else None
