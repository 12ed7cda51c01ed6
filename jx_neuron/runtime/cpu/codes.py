"""Quantized matrices as one CPU reads them fastest, outputs first, and their products.

A few rows go through in passes, in which codes are widened in registers, and nothing else is rounded. For more rows of
int8, activations become two codes of 8 bits each, x ≈ s (a + b / 254) with a scale s a row, and two exact products of
integers are summed: an error of 2^-16 of a row's largest magnitude. Shape suffixes are those of .kernel, and g groups.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jx_neuron.nn.kernel import outputs_first
from jx_neuron.nn.ops import barrier
from jx_neuron.nn.quantized import Form
from jx_neuron.runtime.cpu.kernel import FEW, STREAMS, Formulation, PackedExperts, sums, widen

BITS = 254
"""The second code's steps in one of the first: it is within ±127, and the rest that it has within half a step."""


class PackedCodes(nnx.Module):
    """Matrices of one input as codes [n, k], of int4 [n, g / 2, bytes], and scales [n] or [n, g].

    shapes: of each matrix, [*inputs, *outputs]. `form` is theirs.
    """

    def __init__(
        self, codes: Any, scales: Any, shapes: Sequence[tuple[int, ...]], form: Form, formulation: Formulation
    ):
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)
        self.shapes, self.form, self.formulation = tuple(shapes), form, formulation

    def get_value(self) -> "PackedCodes":
        """Itself, as a parameter gives its array."""
        return self

    def matmul(self, x: Array) -> list[Array]:
        """x · W of each matrix, rounded to the form's `result`, or else the dtype of x."""
        axes, rows = self.form.inputs, x.shape[: x.ndim - self.form.inputs]
        x_mk, codes = x.reshape(math.prod(rows), -1), self.codes[...]
        alone = codes if self.formulation.in_passes(len(x_mk)) else barrier(codes)
        y_mn = matmul_codes(x_mk, alone, self.scales[...], self.form, self.formulation)
        ends = list(accumulate(math.prod(shape[axes:]) for shape in self.shapes))[:-1]
        return [
            y.reshape(*rows, *shape[axes:]).astype(self.form.result or x.dtype)
            for y, shape in zip(jnp.split(y_mn, ends, axis=1), self.shapes, strict=True)
        ]


class PackedExpertCodes(nnx.Module):
    """A matrix of each expert as codes [e, n, k], of int4 [e, n, g / 2, bytes], and scales [e, n] or [e, n, g]; or
    with a first axis of layers of a stack."""

    def __init__(self, codes: Any, scales: Any, form: Form, formulation: Formulation):
        self.codes, self.scales = (nnx.Param(PackedExperts(array, None, formulation)) for array in (codes, scales))
        self.form, self.formulation = form, formulation

    def get_value(self) -> "PackedExpertCodes":
        """Itself, as a parameter gives its array."""
        return self

    def matmul_one(self, x_rk: Array, expert: Array) -> Array:
        """x · W of one expert, [r, n], whose matrix alone is read."""
        codes, scales = (part.get_value().one(expert) for part in (self.codes, self.scales))
        y_rn = matmul_codes(x_rk, codes, scales, self.form, self.formulation)
        return y_rn.astype(self.form.result or x_rk.dtype)


def pack_part(parts: Sequence[np.ndarray], form: Form, part: str) -> np.ndarray:
    """`PackedCodes.codes` or `.scales` of those that `Form.encode` gives for matrices of one input."""
    return np.concatenate([_outputs_first(array, form, part) for array in parts])


def pack_expert_part(parts: Sequence[np.ndarray], form: Form, part: str) -> np.ndarray:
    """The same of the matrices of all experts."""
    (array,) = parts
    return np.stack([_outputs_first(one, form, part) for one in array])


def shapes(shape: Sequence[int], form: Form) -> dict[str, jax.ShapeDtypeStruct]:
    """What `pack_part` gives, for outputs and inputs of [n, k]."""
    n, k = shape
    if form.kind == "int4":
        codes, scales = [n, k // form.group // 2, form.group], [n, k // form.group]
    else:
        codes, scales = [n, k], [n]
    dtype = jnp.int8 if form.kind == "int8" else jnp.uint8
    return {
        "codes": jax.ShapeDtypeStruct(tuple(codes), dtype),
        "scales": jax.ShapeDtypeStruct(tuple(scales), jnp.float32),
    }


def _outputs_first(array: np.ndarray, form: Form, part: str) -> np.ndarray:
    """[n, k] or [n, g / 2, bytes] of codes, and [n] or [n, g] of scales, of one matrix; fp8 as bytes."""
    if part == "scales" and form.kind != "int4":
        return array.reshape(-1)
    turned = outputs_first(array, form.inputs).reshape(-1, math.prod(array.shape[: form.inputs]))
    if part == "scales":
        return turned.astype(np.float32)
    if form.kind == "int4":
        return np.ascontiguousarray(turned.reshape(len(turned), -1, form.group))
    return np.ascontiguousarray(turned.view(np.int8 if form.kind == "int8" else np.uint8))


def matmul_codes(x_mk: Array, codes: Array, scales: Array, form: Form, formulation: Formulation) -> Array:
    """x · Wᵀ, float32 [m, n]."""
    wide_mk = widen(x_mk)
    if formulation.in_passes(len(x_mk)):
        one_pass, most = (_int4_pass, FEW // 2) if form.kind == "int4" else (_pass, FEW)
        parts = [wide_mk[i : i + most] for i in range(0, len(x_mk), most)]
        y_mn = jnp.concatenate([one_pass(part, codes, scales, form) for part in parts])
    elif form.kind == "int8" and formulation.dot == "ynnpack":
        y_mn = _exact_dots(wide_mk, codes)
    else:  # a matrix is widened once x is there, or XLA would widen those of all layers first
        codes, wide_mk = barrier((codes, wide_mk))
        y_mn = barrier(_widened(codes, scales, form) @ wide_mk.T).T
    return y_mn if form.kind == "int4" else y_mn * scales.astype(jnp.float32)


def _pass(x_mk: Array, codes_nk: Array, scales_n: Array, form: Form) -> Array:
    """x · codesᵀ in one reduction, which reads codes once, and widens them in registers."""
    n, m, streams = len(codes_nk), len(x_mk), STREAMS[1]
    size = -(-n // streams)
    starts = [min(i * size, n - size) for i in range(streams)]  # the last part may begin within the one before
    x_mk = barrier(x_mk)
    parts = [_wide(codes_nk[start : start + size], form) for start in starts]
    y = sums([part * x_k for part in parts for x_k in x_mk])
    pieces = [y[i * m + row][i * size - start :] for row in range(m) for i, start in enumerate(starts)]
    return jnp.concatenate(pieces).reshape(m, n)


def _int4_pass(x_mk: Array, codes_npi: Array, scales_ng: Array, form: Form) -> Array:
    """Σ_g scale Σ_i code · x, with the sums of each group of a pair, p, in one reduction."""
    _, p, size = codes_npi.shape
    x_mpji = barrier(x_mk.reshape(len(x_mk), p, 2, size))
    low, high = _nibbles(codes_npi)
    of_groups = barrier(sums([code * x_pji[:, j] for x_pji in x_mpji for j, code in enumerate((low, high))]))
    scales_npj = scales_ng.reshape(-1, p, 2)
    pairs = zip(of_groups[::2], of_groups[1::2], strict=True)
    return jnp.stack(sums([low_np * scales_npj[..., 0] + high_np * scales_npj[..., 1] for low_np, high_np in pairs]))


def _nibbles(codes: Array) -> tuple[Array, Array]:
    """The numbers of bytes' low and high bits, -8 to 7."""
    low, high = codes & np.uint8(15), codes >> np.uint8(4)
    return low.astype(jnp.int8).astype(jnp.float32) - 8, high.astype(jnp.int8).astype(jnp.float32) - 8


def _wide(codes: Array, form: Form) -> Array:
    """Codes of int8, or of fp8 as bytes, in float32."""
    if form.kind == "int8":
        return codes.astype(jnp.float32)
    # e4m3's exponent and fraction as float16's, whose bias is 8 more
    bits = codes.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return half.astype(jnp.float32) * 256


def _widened(codes: Array, scales: Array, form: Form) -> Array:
    """Codes, or of int4 the matrix, in float32 [n, k]."""
    if form.kind != "int4":
        return _wide(codes, form)
    groups = jnp.stack(_nibbles(codes), 2).reshape(*scales.shape, -1)
    return (groups * scales[..., None]).reshape(len(codes), -1)


def _exact_dots(x_mk: Array, codes_nk: Array) -> Array:
    """x · codesᵀ, with x as two codes a number."""
    step_m1 = jnp.maximum(jnp.max(jnp.abs(x_mk), axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    steps_mk = x_mk / step_m1
    first_mk = jnp.round(steps_mk)
    second_mk = jnp.round((steps_mk - first_mk) * BITS)
    both = barrier(jnp.concatenate([first_mk, second_mk]).astype(jnp.int8))
    y = barrier(jax.lax.dot_general(both, codes_nk, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32))
    first_mn, second_mn = jnp.split(y.astype(jnp.float32), 2)
    return (first_mn + second_mn / BITS) * step_m1
