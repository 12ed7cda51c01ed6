"""Matrix products, written as the backend computes them fastest.

On several devices, and on the chip, that is one dot each. On one CPU or GPU every matrix lies in memory with its
outputs first, [n, k], and what reads it fastest depends on the number of rows; `for_cpu` and `for_gpu` say while a
program is traced that it is for one, and docs/benchmarks.md has the figures. Shape suffixes: m rows, k contracted,
n columns; those of attention are nn.py's.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jx_neuron.util.pages import room

FEW = 8
"""Up to as many rows go through in one pass over the matrix: their sums are held in registers."""

STREAMS = {4: 3, 2: 2}
"""Parts of a matrix that are read side by side in that pass, by bytes of its entries: a row loaded once serves each."""

BLOCK = 128
"""Queries that go through attention together, where later slots can be left out."""

LANES = 32
"""A mean is of as many sums side by side, as torch's: a number that outweighs the rest then rounds few of them off."""

T = TypeVar("T")

barrier = jax.lax.optimization_barrier

_for_cpu: ContextVar[dict[tuple[int, ...], tuple[Array, list[Array]]] | None] = ContextVar("_for_cpu", default=None)
"""What was taken apart for the program that is traced, if that is for a CPU, by the parts' ids."""

_for_gpu: ContextVar[bool] = ContextVar("_for_gpu", default=False)


@contextmanager
def for_cpu() -> Iterator[None]:
    """Products traced in this context are for one CPU device."""
    token = _for_cpu.set({})
    try:
        yield
    finally:
        _for_cpu.reset(token)


@contextmanager
def for_gpu() -> Iterator[None]:
    """Products traced in this context are for one GPU device."""
    token = _for_gpu.set(True)
    try:
        yield
    finally:
        _for_gpu.reset(token)


def is_for_cpu() -> bool:
    """Whether what is traced is for one CPU device."""
    return _for_cpu.get() is not None


def once(x: T) -> T:
    """x, computed once: for a CPU, XLA would fuse what makes it with each of its uses."""
    return barrier(x) if is_for_cpu() else x


def product(x: Array, kernels: Sequence[Array], axes: int) -> list[Array]:
    """x · kernel with each of `kernels`, over the last `axes` axes of x and the first of the kernel."""
    rows, k = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    if _for_gpu.get() and math.prod(rows) == 1:
        return [_row(x, kernel, axes).reshape(*rows, *kernel.shape[axes:]) for kernel in kernels]
    if not is_for_cpu():
        return [jnp.tensordot(x, kernel, axes=axes) for kernel in kernels]
    x_mk, w_nk, dtype = x.reshape(-1, k), together(kernels, axes), kernels[0].dtype
    y_mn = _product(x_mk, w_nk if are_few(len(x_mk), dtype) else barrier(w_nk), dtype)
    ends = accumulate(math.prod(kernel.shape[axes:]) for kernel in kernels)
    parts = jnp.split(y_mn, list(ends)[:-1], axis=1)
    return [part.reshape(*rows, *kernel.shape[axes:]) for part, kernel in zip(parts, kernels, strict=True)]


def product_with_rows(x: Array, table_nk: Array) -> Array:
    """x · tableᵀ, over the last axis of both."""
    if _for_gpu.get() and x.size == x.shape[-1]:
        return _row(x, table_nk.T, 1).reshape(*x.shape[:-1], -1)
    if not is_for_cpu():
        return jnp.einsum("...k,nk->...n", x, table_nk)
    # XLA would widen a 16-bit table once, whole, for this and for its use as an embedding
    alone_nk = bits(barrier(table_nk))
    return _product(x.reshape(-1, x.shape[-1]), alone_nk, table_nk.dtype).reshape(*x.shape[:-1], -1)


def _row(x: Array, kernel: Array, axes: int) -> Array:
    """x · kernel of a single row, as a sum: a GPU spends more of its bandwidth on that than on a dot."""
    terms = _wide(x).reshape(*kernel.shape[:axes], *[1] * (kernel.ndim - axes)) * _wide(kernel)
    return terms.sum(range(axes)).astype(jnp.result_type(x, kernel))


def query_blocks(tokens: int, slots: int) -> list[tuple[int, int, int]]:
    """Queries to go through attention together: the first, the one after the last, and how many slots they may see.

    Where as many tokens as slots go through, they stand at the slots' positions, and none sees those behind it.
    """
    if not is_for_cpu() or tokens != slots:
        return [(0, tokens, slots)]
    ends = [*range(BLOCK, tokens, BLOCK), tokens]
    return [(first, end, end) for first, end in zip([0, *ends], ends, strict=False)]


def query_key(q_btkgh: Array, k_bksh: Array) -> Array:
    """q · kᵀ of each query head with its group's keys: float32 [b, k, g, t, s]."""
    if not is_for_cpu():
        # the cache first: XLA then leaves the scores in their order, where the other way round it transposes them
        return jnp.einsum("bksh,btkgh->bkgts", k_bksh, q_btkgh, preferred_element_type=jnp.float32)
    b, t, k, g, h = q_btkgh.shape
    if g * t <= FEW:
        w_bkrs = _few(_wide(q_btkgh).transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h), k_bksh)
    else:  # tokens last, as products leave them
        q_bkhr = _wide(q_btkgh).transpose(0, 2, 4, 3, 1).reshape(b, k, h, g * t)
        w_bkrs = _dot(q_bkhr, _wide(k_bksh), 2, 3)
    return w_bkrs.reshape(b, k, g, t, -1)


def weigh_values(w_bkgts: Array, v_bksh: Array) -> Array:
    """softmax(w) · v of each query head with its group's values: [b, t, k, g, h]; w is float32."""
    if is_for_cpu() and v_bksh.dtype.itemsize == 4:  # the sum divides the result, which is smaller than the weights
        e_bkgts = jnp.exp(w_bkgts - w_bkgts.max(-1, keepdims=True))
        return _weigh(e_bkgts, v_bksh) / jnp.moveaxis(e_bkgts.sum(-1), 3, 1)[..., None]
    p_bkgts = jax.nn.softmax(w_bkgts, axis=-1).astype(v_bksh.dtype)
    if not is_for_cpu():
        return jnp.einsum("bksh,bkgts->btkgh", v_bksh, p_bkgts)
    return _weigh(p_bkgts, v_bksh).astype(v_bksh.dtype)


def _weigh(p_bkgts: Array, v_bksh: Array) -> Array:
    b, k, g, t, s = p_bkgts.shape
    p_bkrs = _wide(p_bkgts).reshape(b, k, g * t, s)
    a_bkrh = _few(p_bkrs, v_bksh.swapaxes(2, 3)) if g * t <= FEW else _dot(p_bkrs, _wide(v_bksh), 3, 2)
    return a_bkrh.reshape(b, k, g, t, -1).transpose(0, 3, 1, 2, 4)


def _few(x_bkrc: Array, y_bknc: Array) -> Array:
    """x · yᵀ of few rows x, over c, in one reduction that reads y once: [b, k, r, n]."""
    r = x_bkrc.shape[2]
    x_rbkc = barrier(jnp.moveaxis(x_bkrc, 2, 0))
    if r == 1:  # a reduction of one result is read at half the rate
        x_rbkc = jnp.pad(x_rbkc, ((0, 1), (0, 0), (0, 0), (0, 0)))
    sums = _sums([_wide(y_bknc) * x_bkc[:, :, None] for x_bkc in x_rbkc])
    return jnp.stack(sums, 2) if r > 1 else (sums[0] + sums[1])[:, :, None]


def mean(x: Array) -> Array:
    """The mean over the last axis, which stays with a size of 1."""
    lanes = math.gcd(x.shape[-1], LANES)
    if not is_for_cpu() or lanes == 1:
        return x.mean(-1, keepdims=True)
    sums = barrier(x.reshape(*x.shape[:-1], -1, lanes).sum(-2))  # or XLA would join both sums
    return sums.sum(-1, keepdims=True) / x.shape[-1]


def outputs_first(kernel: Any, axes: int) -> Any:
    """A kernel [*inputs, *outputs] as [*outputs, *inputs]; numpy's or JAX's, as it is given."""
    return kernel.transpose(*range(axes, kernel.ndim), *range(axes))


def inputs_first(kernel: Array, axes: int) -> Array:
    """The inverse of `outputs_first`."""
    return jnp.moveaxis(kernel, range(-axes, 0), range(axes))


def together(kernels: Sequence[Any], axes: int) -> Any:
    """Kernels [*inputs, *outputs] of the same inputs as one array [n, k] of `bits`, as a CPU reads them fastest.

    n counts the outputs of one after the other's, k the inputs. Arrays are numpy's or JAX's, as they are given.
    """
    if (found := (_for_cpu.get() or {}).get(tuple(map(id, kernels)))) is not None:
        return found[0]  # which XLA does not find again where they are parts of a part
    turned = [outputs_first(kernel, axes) for kernel in kernels]
    flat = [kernel.reshape(-1, math.prod(kernel.shape[kernel.ndim - axes :])) for kernel in turned]
    parts = [bits(kernel) for kernel in flat]
    if not isinstance(parts[0], np.ndarray):
        return jnp.concatenate(parts)
    return np.concatenate(parts, out=room((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype))


def apart(joined_nk: Array, shapes: Sequence[Sequence[int]], axes: int, dtype: Any) -> list[Array]:
    """The inverse of `together`, where kernels are of `shapes`."""
    ends = accumulate(math.prod(shape[axes:]) for shape in shapes)
    parts = [from_bits(part, dtype) for part in jnp.split(joined_nk, list(ends)[:-1])]
    turned = [part.reshape(*shape[axes:], *shape[:axes]) for part, shape in zip(parts, shapes, strict=True)]
    kernels = [inputs_first(kernel, axes) for kernel in turned]
    if (known := _for_cpu.get()) is not None:
        known[tuple(map(id, kernels))] = joined_nk, kernels
    return kernels


def bits(x: Any) -> Any:
    """16-bit numbers as uint16, and others as they are: XLA widens bfloat16 to do as little as take a part of it."""
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `bits`."""
    return jax.lax.bitcast_convert_type(x, dtype)


def are_few(rows: int, dtype: Any) -> bool:
    """Whether so many rows are multiplied in passes over a matrix, which then need not lie alone in memory."""
    return rows <= (FEW if jnp.dtype(dtype).itemsize == 4 else 4 * FEW)


def are_several(rows: int) -> bool:
    """Whether one pass of so many rows is bound by arithmetic too, which wide vectors help; fewer they slow down."""
    return FEW // 2 < rows <= FEW


def _product(x_mk: Array, w_nk: Array, dtype: Any) -> Array:
    """x · wᵀ, where w is `bits` of `dtype`."""
    m, narrow = len(x_mk), jnp.result_type(x_mk, dtype)
    x_mk = _wide(x_mk)
    if are_few(m, dtype):
        parts = [x_mk[i : i + FEW] for i in range(0, m, FEW)]
        y_mn = jnp.concatenate([_in_one_pass(part, w_nk, dtype) for part in parts])
    else:  # without the barrier XLA would make it x · wᵀ, and transpose the matrix first
        y_mn = barrier(_wide(from_bits(w_nk, dtype)) @ x_mk.T).T
    return y_mn.astype(narrow)


def _in_one_pass(x_mk: Array, w_nk: Array, dtype: Any) -> Array:
    """The same in one reduction, which reads, and widens, w once."""
    n, m, streams = len(w_nk), len(x_mk), STREAMS[w_nk.dtype.itemsize]
    size = -(-n // streams)
    starts = [min(i * size, n - size) for i in range(streams)]  # the last part may begin within the one before
    x_mk = barrier(x_mk)  # what makes it would be fused, and done again for each output
    parts = [_wide(from_bits(w_nk[start : start + size], dtype)) for start in starts]
    y = _sums([part * x_k for part in parts for x_k in x_mk])
    pieces = [y[i * m + row][i * size - start :] for row in range(m) for i, start in enumerate(starts)]
    return jnp.concatenate(pieces).reshape(m, n)


def _sums(terms: Sequence[Array]) -> Sequence[Array]:
    """The sum of each over its last axis, in one reduction: what several read is read once."""
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    found: Sequence[Array] = jax.lax.reduce(tuple(terms), zeros, _add, (terms[0].ndim - 1,))
    return found


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, a, b))


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """x · y over an axis of each, all but the last two in common; XLA neither swaps nor fuses it."""
    common = tuple(range(x.ndim - 2))
    return barrier(jax.lax.dot_general(barrier(x), y, (((x_axis,), (y_axis,)), (common, common))))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
