"""Quantized matrices as one CPU reads them fastest, outputs first, and their products.

A few rows are multiplied in passes that widen codes in registers, and nothing else is rounded. For more rows of int8,
activations become two codes of 8 bits each, x ≈ s (a + b / 254) with a scale s a row, and two exact products of
integers are summed: an error of 2^-16 of a row's largest magnitude. Shape suffixes are those of .kernel, and g groups.
"""

import math
from collections.abc import Mapping, Sequence
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
from jx_neuron.runtime.cpu.kernel import FEW, STREAMS, Formulation, PackedExperts, from_bits, sums, widen

BITS = 254
"""The second code's steps in one of the first: it is within ±127, and the rest that it has within half a step."""


class PackedCodes(nnx.Module):
    """Matrices of one input as codes [n, k] and scales [n]; of int4 as codes [n, k / 2], scales and offsets [n, g].

    parts:  these, by the names of `form`, which is that of the matrices.
    shapes: of each matrix, [*inputs, *outputs].
    """

    def __init__(
        self, parts: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], form: Form, formulation: Formulation
    ):
        for name in form.parts:
            setattr(self, name, nnx.Param(parts[name]))
        self.shapes, self.form, self.formulation = tuple(shapes), form, formulation

    def get_value(self) -> "PackedCodes":
        """Itself, as a parameter gives its array."""
        return self

    def matmul(self, x: Array) -> list[Array]:
        """x · W of each matrix, rounded to the form's `result`, or else the dtype of x."""
        axes, rows = self.form.inputs, x.shape[: x.ndim - self.form.inputs]
        x_mk = x.reshape(math.prod(rows), -1)
        codes, *factors = (getattr(self, name)[...] for name in self.form.parts)
        alone = codes if self.formulation.in_passes(len(x_mk)) else barrier(codes)
        y_mn = matmul_codes(x_mk, alone, factors, self.form, self.formulation)
        ends = list(accumulate(math.prod(shape[axes:]) for shape in self.shapes))[:-1]
        return [
            y.reshape(*rows, *shape[axes:]).astype(self.form.result or x.dtype)
            for y, shape in zip(jnp.split(y_mn, ends, axis=1), self.shapes, strict=True)
        ]


class PackedExpertCodes(nnx.Module):
    """A matrix of each expert: the arrays of `PackedCodes` with a first axis of experts, and in a stack one of layers
    before it."""

    def __init__(self, parts: Mapping[str, Any], form: Form, formulation: Formulation):
        for name in form.parts:
            setattr(self, name, nnx.Param(PackedExperts(parts[name], None, formulation)))
        self.form, self.formulation = form, formulation

    def get_value(self) -> "PackedExpertCodes":
        """Itself, as a parameter gives its array."""
        return self

    def matmul_one(self, x_rk: Array, expert: Array) -> Array:
        """x · W of one expert, [r, n], whose matrix alone is read."""
        codes, *factors = (getattr(self, name).get_value().one(expert) for name in self.form.parts)
        y_rn = matmul_codes(x_rk, codes, factors, self.form, self.formulation)
        return y_rn.astype(self.form.result or x_rk.dtype)


def pack_part(parts: Sequence[np.ndarray], form: Form, part: str) -> np.ndarray:
    """A part of `PackedCodes`: that part of each matrix of one input, as `Form.encode` gives it."""
    return np.concatenate([_outputs_first(array, form, part) for array in parts])


def pack_expert_part(parts: Sequence[np.ndarray], form: Form, part: str) -> np.ndarray:
    """The same of the matrices of all experts."""
    (array,) = parts
    return np.stack([_outputs_first(one, form, part) for one in array])


def shapes(shape: Sequence[int], form: Form) -> dict[str, jax.ShapeDtypeStruct]:
    """The result of `pack_part`, for outputs and inputs of [n, k]."""
    n, k = shape
    if form.kind == "int4":
        groups = jax.ShapeDtypeStruct((n, k // form.group), jnp.uint16)
        return {"codes": jax.ShapeDtypeStruct((n, k // 2), jnp.uint8), "scales": groups, "offsets": groups}
    return {
        "codes": jax.ShapeDtypeStruct((n, k), jnp.int8 if form.kind == "int8" else jnp.uint8),
        "scales": jax.ShapeDtypeStruct((n,), jnp.float32),
    }


def _outputs_first(array: np.ndarray, form: Form, part: str) -> np.ndarray:
    """A part of one matrix; fp8 as bytes, and float16 as its bits."""
    if part == "scales" and form.kind != "int4":
        return array.reshape(-1)
    turned = outputs_first(array, form.inputs).reshape(-1, math.prod(array.shape[: form.inputs]))
    dtype = np.uint16 if part != "codes" else np.int8 if form.kind == "int8" else np.uint8
    return np.ascontiguousarray(turned.view(dtype))


def matmul_codes(x_mk: Array, codes: Array, factors: Sequence[Array], form: Form, formulation: Formulation) -> Array:
    """x · Wᵀ, float32 [m, n]. `factors` are scales, and of int4 offsets."""
    wide_mk = widen(x_mk)
    if formulation.in_passes(len(x_mk)):
        one_pass = _int4_pass if form.kind == "int4" else _pass
        parts = [wide_mk[i : i + FEW] for i in range(0, len(x_mk), FEW)]
        y_mn = jnp.concatenate([one_pass(part, codes, factors, form) for part in parts])
    elif form.kind == "int8" and formulation.dot == "ynnpack":
        y_mn = _exact_dots(wide_mk, codes)
    else:  # a matrix is widened once x is there, or XLA would widen those of all layers first
        codes, wide_mk = barrier((codes, wide_mk))
        y_mn = barrier(_widened(codes, factors, form) @ wide_mk.T).T
    return y_mn if form.kind == "int4" else y_mn * factors[0].astype(jnp.float32)


def _pass(x_mk: Array, codes_nk: Array, factors: Sequence[Array], form: Form) -> Array:
    """x · codesᵀ in one reduction, which reads codes once, and widens them in registers."""
    n, m, streams = len(codes_nk), len(x_mk), STREAMS[1]
    size = -(-n // streams)
    starts = [min(i * size, n - size) for i in range(streams)]  # the last part may begin within the one before
    x_mk = barrier(x_mk)
    parts = [_wide(codes_nk[start : start + size], form) for start in starts]
    y = sums([part * x_k for part in parts for x_k in x_mk])
    pieces = [y[i * m + row][i * size - start :] for row in range(m) for i, start in enumerate(starts)]
    return jnp.concatenate(pieces).reshape(m, n)


def _int4_pass(x_mk: Array, codes_nk: Array, factors: Sequence[Array], form: Form) -> Array:
    """x · (codes · scales + offsets)ᵀ in one reduction over bytes, of which each has the codes of two inputs."""
    x_mpji = x_mk.reshape(len(x_mk), -1, 2, form.group)
    x_jmk = barrier(tuple(x_mpji[:, :, j].reshape(len(x_mk), -1) for j in range(2)))
    w_jnk = _two_in_a_byte(codes_nk, factors, form)
    return jnp.stack(sums([w_jnk[0] * low_k + w_jnk[1] * high_k for low_k, high_k in zip(*x_jmk, strict=True)]))


def _two_in_a_byte(codes_nk: Array, factors: Sequence[Array], form: Form) -> list[Array]:
    """The numbers of bytes' low, and of their high bits, [n, k / 2] each."""

    def each(factor_ng: Array, j: int) -> Array:
        of_pairs = from_bits(factor_ng.reshape(len(factor_ng), -1, 2)[..., j], jnp.float16).astype(jnp.float32)
        return jnp.broadcast_to(of_pairs[..., None], (*of_pairs.shape, form.group)).reshape(codes_nk.shape)

    scales_ng, offsets_ng = factors
    nibbles = codes_nk & np.uint8(15), codes_nk >> np.uint8(4)
    # as signed numbers, which vectors convert
    return [
        code.astype(jnp.int8).astype(jnp.float32) * each(scales_ng, j) + each(offsets_ng, j)
        for j, code in enumerate(nibbles)
    ]


def _wide(codes: Array, form: Form) -> Array:
    """Codes of int8, or of fp8 as bytes, in float32."""
    if form.kind == "int8":
        return codes.astype(jnp.float32)
    # e4m3's exponent and fraction as float16's, whose bias is 8 more
    bits = codes.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return half.astype(jnp.float32) * 256


def _widened(codes_nk: Array, factors: Sequence[Array], form: Form) -> Array:
    """Codes, or of int4 the matrix, in float32 [n, k]."""
    if form.kind != "int4":
        return _wide(codes_nk, form)
    halves = [half.reshape(len(half), -1, form.group) for half in _two_in_a_byte(codes_nk, factors, form)]
    return jnp.stack(halves, 2).reshape(len(codes_nk), -1)


def _exact_dots(x_mk: Array, codes_nk: Array) -> Array:
    """x · codesᵀ, with x as two codes a number."""
    x_mk = barrier(x_mk)  # what makes it would be computed again, a number at a time
    step_m1 = barrier(jnp.maximum(jnp.max(jnp.abs(x_mk), axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127)
    steps_mk = x_mk / step_m1
    first_mk = jnp.round(steps_mk)
    second_mk = jnp.round((steps_mk - first_mk) * BITS)
    both = barrier(jnp.concatenate(barrier((first_mk.astype(jnp.int8), second_mk.astype(jnp.int8)))))
    if len(x_mk) > FEW:
        first_mn, second_mn = jnp.split(_int_dot(both, codes_nk), 2)
        return (first_mn + second_mn / BITS) * step_m1
    # YNNPACK packs the second operand at each call: the smaller one
    first_nm, second_nm = jnp.split(_int_dot(codes_nk, both), 2, axis=1)
    return ((first_nm + second_nm / BITS) * step_m1[:, 0]).T


def _int_dot(x_mk: Array, y_nk: Array) -> Array:
    """x · yᵀ of int8, summed as integers, in float32."""
    dot = jax.lax.dot_general(x_mk, y_nk, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return barrier(dot).astype(jnp.float32)
