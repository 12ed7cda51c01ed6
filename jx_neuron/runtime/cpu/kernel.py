"""Weight matrices as one CPU reads them fastest, and their products.

Matrices of one input lie in one array [n, k], outputs first. What reads it fastest depends on the number of rows: a few
go through in one reduction, many in one dot (docs/notes/cpu-decode.md and cpu-prefill.md have the figures). Shape
suffixes: m rows, k contracted, n columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jx_neuron.nn.kernel import inputs_first, outputs_first
from jx_neuron.nn.ops import barrier
from jx_neuron.util.pages import allocate

FEW = 8
"""Up to as many rows go through in one pass over the matrix: their sums are held in registers."""

STREAMS = {4: 3, 2: 2}
"""Parts of a matrix that are read side by side in that pass, by bytes of its entries: a row loaded once serves each."""


@partial(jax.tree_util.register_dataclass, data_fields=["w_nk"], meta_fields=["shapes", "axes", "dtype"])
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

    def matmul(self, x: Array) -> list[Array]:
        rows = x.shape[: x.ndim - self.axes]
        x_mk = x.reshape(-1, self.w_nk.shape[1])
        alone_nk = self.w_nk if are_few(len(x_mk), self.dtype) else barrier(self.w_nk)
        y_mn = matmul_packed(x_mk, alone_nk, self.dtype)
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


def pack(kernels: Sequence[np.ndarray], axes: int) -> np.ndarray:
    """`Packed.w_nk` of matrices [*inputs, *outputs] of the same inputs."""
    inputs = math.prod(kernels[0].shape[:axes])
    parts = [to_bits(outputs_first(kernel, axes).reshape(-1, inputs)) for kernel in kernels]
    return np.concatenate(parts, out=allocate((sum(map(len, parts)), inputs), parts[0].dtype))


def to_bits(x: Any) -> Any:
    """16-bit numbers as uint16, and others as they are: XLA widens bfloat16 to do as little as take a part of it."""
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype)


def are_few(rows: int, dtype: Any) -> bool:
    """Whether so many rows are multiplied in passes over a matrix, which then need not lie alone in memory."""
    return rows <= (FEW if jnp.dtype(dtype).itemsize == 4 else 4 * FEW)


def are_several(rows: int) -> bool:
    """Whether one pass of so many rows is bound by arithmetic too, which wide vectors help; fewer they slow down."""
    return FEW // 2 < rows <= FEW


def matmul_packed(x_mk: Array, w_nk: Array, dtype: Any) -> Array:
    """x · wᵀ, where w is `to_bits` of `dtype`."""
    m, narrow = len(x_mk), jnp.result_type(x_mk, dtype)
    x_mk = widen(x_mk)
    if are_few(m, dtype):
        parts = [x_mk[i : i + FEW] for i in range(0, m, FEW)]
        y_mn = jnp.concatenate([_in_one_pass(part, w_nk, dtype) for part in parts])
    else:  # without the barrier XLA would make it x · wᵀ, and transpose the matrix first
        y_mn = barrier(widen(from_bits(w_nk, dtype)) @ x_mk.T).T
    return y_mn.astype(narrow)


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
