"""Weight matrices as one CPU reads them fastest, and their products.

Matrices of one input are one array [n, k], outputs first. The fastest way to read it depends on the number of rows: a
few are multiplied in one reduction, many in one dot (figures: docs/notes/cpu-decode.md and cpu-prefill.md). Shape
suffixes: m rows, k contracted, n columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jx_neuron.nn.kernel import Indexed, inputs_first, outputs_first
from jx_neuron.nn.ops import barrier
from jx_neuron.util.pages import allocate

FEW = 8
"""Up to as many rows are multiplied in one pass over the matrix: their sums are held in registers."""

CLASSES = (1, FEW // 2, FEW)
"""Classes of the rows of a pass, each by its most: a row, what memory limits, and what arithmetic limits too."""

STREAMS = {4: 3, 2: 2, 1: 2}
"""Parts of a matrix that are read side by side in that pass, by bytes of its entries: a row loaded once serves each."""


@dataclass(frozen=True)
class Formulation:
    """How matrices of one dtype are multiplied (jx_neuron.runtime.cpu.formulation chooses).

    wide:   the CLASSES of rows of a pass whose programs have vectors of 512 bits; LLVM prefers 256, also where the CPU
            has 512.
    passes: most rows that are multiplied in passes over a matrix, of up to 8 each.
    dot:    how more rows are multiplied: "ynnpack" takes matrices of 16 bits as they are, and multiplies codes of int8
            with activations of two codes (jx_neuron.runtime.cpu.codes); "eigen" widens matrices first.
    """

    wide: tuple[int, ...]
    passes: int
    dot: Literal["eigen", "ynnpack"]

    def __post_init__(self) -> None:
        if not {*self.wide} <= {*CLASSES}:
            raise ValueError(f"wide={self.wide}: legal are some of {CLASSES}")
        if self.passes not in (1, 2, 4, 8, 16, 24, 32):
            raise ValueError(f"passes={self.passes}: legal are 1, 2, 4, 8, 16, 24 and 32")

    def in_passes(self, rows: int) -> bool:
        """Whether this number of rows is multiplied in passes over a matrix, which may be part of a larger array."""
        return rows <= self.passes

    def is_wide(self, rows: int) -> bool:
        """Whether programs of this number of rows have vectors of 512 bits."""
        return next((most for most in CLASSES if rows <= most), None) in self.wide


@partial(jax.tree_util.register_dataclass, data_fields=["w_nk"], meta_fields=["shapes", "axes", "dtype", "formulation"])
@dataclass(frozen=True)
class Packed:
    """Matrices of one input, one after the other's outputs, as `to_bits` of `dtype`.

    shapes: of each matrix, [*inputs, *outputs].
    axes:   how many of these are inputs.
    """

    w_nk: Array
    shapes: tuple[tuple[int, ...], ...]
    axes: int
    dtype: Any
    formulation: Formulation

    def matmul(self, x: Array) -> list[Array]:
        rows = x.shape[: x.ndim - self.axes]
        x_mk = x.reshape(-1, self.w_nk.shape[1])
        alone_nk = self.w_nk if self.formulation.in_passes(len(x_mk)) else barrier(self.w_nk)
        y_mn = matmul_packed(x_mk, alone_nk, self.dtype, self.formulation)
        return [
            y.reshape(*rows, *shape[self.axes :])
            for y, shape in zip(jnp.split(y_mn, self._ends(), axis=1), self.shapes, strict=True)
        ]

    def unpack(self) -> list[Array]:
        """The matrices, [*inputs, *outputs] each."""
        turned = [
            from_bits(part, self.dtype).reshape(*shape[self.axes :], *shape[: self.axes])
            for part, shape in zip(jnp.split(self.w_nk, self._ends()), self.shapes, strict=True)
        ]
        return [inputs_first(kernel, self.axes) for kernel in turned]

    def __getitem__(self, index: Any) -> Array:
        (kernel,) = self.unpack()
        return kernel[index]

    def _ends(self) -> list[int]:
        """Where the outputs of each matrix but the last end."""
        return list(accumulate(math.prod(shape[self.axes :]) for shape in self.shapes))[:-1]


@partial(jax.tree_util.register_dataclass, data_fields=["w_enk", "layer"], meta_fields=["dtype", "formulation"])
@dataclass(frozen=True)
class PackedExperts(Indexed):
    """A matrix of each expert, as `to_bits` of `dtype`: [e, n, k], or [l, e, n, k] of the layers of a stack.

    layer: that of the stack whose experts these are; None without a stack.
    """

    w_enk: Array
    dtype: Any
    formulation: Formulation
    layer: Array | int | None = None

    def of_period(self, number: Array | int) -> "PackedExperts":
        return replace(self, layer=number)

    def matmul_one(self, x_rk: Array, expert: Array) -> Array:
        """x · W of one expert, [r, n], whose matrix alone is read."""
        return matmul_packed(x_rk, self.one(expert), self.dtype, self.formulation)

    def one(self, expert: Array) -> Array:
        """The array of one expert."""
        place = (expert,) if self.layer is None else (jnp.asarray(self.layer, expert.dtype), expert)
        shape = self.w_enk.shape[len(place) :]
        start = (*place, *[jnp.zeros_like(expert)] * len(shape))
        return jax.lax.dynamic_slice(self.w_enk, start, (1,) * len(place) + shape).reshape(shape)


def pack_experts(kernels: Sequence[np.ndarray]) -> np.ndarray:
    """`PackedExperts.w_enk` of one matrix [e, k, n]."""
    (kernel_ekn,) = kernels
    return np.ascontiguousarray(to_bits(kernel_ekn.transpose(0, 2, 1)))


def pack(kernels: Sequence[np.ndarray], axes: int) -> np.ndarray:
    """`Packed.w_nk` of matrices [*inputs, *outputs] of the same inputs."""
    inputs = math.prod(kernels[0].shape[:axes])
    parts = [to_bits(outputs_first(kernel, axes).reshape(-1, inputs)) for kernel in kernels]
    return np.concatenate(parts, out=allocate((sum(map(len, parts)), inputs), parts[0].dtype))


def to_bits(x: Any) -> Any:
    """16-bit numbers as uint16, and others unchanged: XLA widens bfloat16 even to slice an array."""
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype)


def matmul_packed(x_mk: Array, w_nk: Array, dtype: Any, formulation: Formulation) -> Array:
    """x · wᵀ, where w is `to_bits` of `dtype`."""
    m, narrow = len(x_mk), jnp.result_type(x_mk, dtype)
    if formulation.in_passes(m):
        wide_mk = widen(x_mk)
        parts = [wide_mk[i : i + FEW] for i in range(0, m, FEW)]
        y_mn = jnp.concatenate([_in_one_pass(part, w_nk, dtype) for part in parts])
    elif formulation.dot == "ynnpack" and x_mk.dtype == dtype:
        y_mn = barrier(_outputs_dot(barrier(x_mk), from_bits(w_nk, dtype)))
    else:  # without the barrier XLA would make it x · wᵀ, and transpose the matrix first
        y_mn = barrier(widen(from_bits(w_nk, dtype)) @ widen(x_mk).T).T
    return y_mn.astype(narrow)


def _outputs_dot(x_mk: Array, w_nk: Array) -> Array:
    """x · wᵀ, summed in float32."""
    return jax.lax.dot_general(x_mk, w_nk, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _in_one_pass(x_mk: Array, w_nk: Array, dtype: Any) -> Array:
    """The same in one reduction, which reads, and widens, w once."""
    n, m, streams = len(w_nk), len(x_mk), STREAMS[w_nk.dtype.itemsize]
    size = -(-n // streams)
    starts = [min(i * size, n - size) for i in range(streams)]  # the last part may begin within the one before
    x_mk = barrier(x_mk)  # what makes it would be fused, and done again for each output
    parts = [widen(from_bits(w_nk[start : start + size], dtype)) for start in starts]
    y = sums([part * x_k for part in parts for x_k in x_mk])
    pieces = [y[i * m + row][i * size - start :] for row in range(m) for i, start in enumerate(starts)]
    return jnp.concatenate(pieces).reshape(m, n)


def sums(terms: Sequence[Array]) -> Sequence[Array]:
    """The sum of each over its last axis, in one reduction: what several read is read once."""
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    reduced: Sequence[Array] = jax.lax.reduce(tuple(terms), zeros, _add, (terms[0].ndim - 1,))
    return reduced


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, a, b))


def widen(x: Array) -> Array:
    """x in float32, or in its own dtype where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
