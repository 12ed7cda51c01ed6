"""Matrix products, written as the backend computes them fastest.

Everywhere but on a CPU that is one dot each. XLA's CPU backend reads a matrix faster in other forms, and sums float32
in shorter chains; `for_cpu` chooses these while a program is traced. Shape suffixes: m rows, k contracted, n columns.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import Array

FEW = 16
"""Up to as many rows, reading the matrix is what a product takes."""

CHUNK = 384
"""How many float32 products are summed in one chain."""

_for_cpu: ContextVar[bool] = ContextVar("_for_cpu", default=False)


@contextmanager
def for_cpu() -> Iterator[None]:
    """Products traced in this context are for one CPU device."""
    token = _for_cpu.set(True)
    try:
        yield
    finally:
        _for_cpu.reset(token)


def product(x: Array, kernel: Array, axes: int) -> Array:
    """x · kernel, over the last `axes` axes of x and the first of the kernel."""
    if not _for_cpu.get():
        return jnp.tensordot(x, kernel, axes=axes)
    k = math.prod(kernel.shape[:axes])
    form: Callable[[Array, Array], Array]
    if kernel.dtype.itemsize < 4:
        form, matrix = _by_rows, outputs_first(kernel, axes).reshape(-1, k)
    else:
        form, matrix = _by_columns, kernel.reshape(k, -1)
    y_mn = form(x.reshape(-1, k), matrix)
    return y_mn.reshape(*x.shape[: x.ndim - axes], *kernel.shape[axes:])


def product_with_rows(x: Array, table_nk: Array) -> Array:
    """x · tableᵀ, over the last axis of both."""
    if not _for_cpu.get():
        return jnp.einsum("...k,nk->...n", x, table_nk)
    # XLA would widen a 16-bit table once, whole, for this and for its use as an embedding
    alone_nk = jax.lax.optimization_barrier(table_nk)
    return _by_rows(x.reshape(-1, x.shape[-1]), alone_nk).reshape(*x.shape[:-1], -1)


def outputs_first(kernel: Array, axes: int) -> Array:
    """A kernel [*inputs, *outputs] as [*outputs, *inputs], which is how a CPU reads 16-bit ones fastest."""
    return jnp.moveaxis(kernel, range(axes), range(-axes, 0))


def inputs_first(kernel: Array, axes: int) -> Array:
    """The inverse of `outputs_first`."""
    return jnp.moveaxis(kernel, range(-axes, 0), range(axes))


def _by_columns(x_mk: Array, w_kn: Array) -> Array:
    """A single row in chunks of k, which are read by several threads; its chains of sums are as short as a chunk."""
    m, k = x_mk.shape
    chunks = next((c for c in range(-(-k // CHUNK), k // 64 + 1) if k % c == 0), 1)
    if m > 1 or chunks == 1:
        return x_mk @ w_kn
    x_mck, w_ckn = x_mk.reshape(m, chunks, -1), w_kn.reshape(chunks, k // chunks, -1)
    return jnp.einsum("mck,ckn->cmn", x_mck, w_ckn).sum(0)


def _by_rows(x_mk: Array, w_nk: Array) -> Array:
    """Few rows as multiply and sum: one pass over the matrix, which takes 16-bit entries as they lie."""
    m, dtype = x_mk.shape[0], jnp.result_type(x_mk, w_nk)
    wide = w_nk.dtype.itemsize >= 4
    if m > FEW or (m == 1 and wide):
        return jnp.einsum("mk,nk->mn", *_float32(x_mk, w_nk)).astype(dtype)
    rows = max(m, 4)  # fewer are not vectorized
    x_mk, w_nk = _float32(jnp.pad(x_mk, ((0, rows - m), (0, 0))), w_nk)
    return (w_nk[:, None] * x_mk).sum(-1).T[:m].astype(dtype)


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in arrays)
