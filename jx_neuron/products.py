"""Matrix products, written as the backend computes them fastest.

Everywhere but on a CPU that is one dot each. There every matrix lies in memory with its outputs first, [n, k], and what
reads it fastest depends on the number of rows; `for_cpu` says while a program is traced that it is for a CPU, and
docs/benchmarks.md has the figures. Shape suffixes: m rows, k contracted, n columns; those of attention are nn.py's.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

FEW = 8
"""Up to as many rows go through in one pass over the matrix: their sums are held in registers."""

LANES = 32
"""A mean is of as many sums side by side, as torch's: a number that outweighs the rest then rounds few of them off."""

AnyArray = TypeVar("AnyArray", Array, np.ndarray)

barrier = jax.lax.optimization_barrier

_for_cpu: ContextVar[bool] = ContextVar("_for_cpu", default=False)


@contextmanager
def for_cpu() -> Iterator[None]:
    """Products traced in this context are for one CPU device."""
    token = _for_cpu.set(True)
    try:
        yield
    finally:
        _for_cpu.reset(token)


def is_for_cpu() -> bool:
    """Whether what is traced is for one CPU device."""
    return _for_cpu.get()


def product(x: Array, kernel: Array, axes: int) -> Array:
    """x · kernel, over the last `axes` axes of x and the first of the kernel."""
    if not is_for_cpu():
        return jnp.tensordot(x, kernel, axes=axes)
    k = math.prod(kernel.shape[:axes])
    y_mn = _product(x.reshape(-1, k), outputs_first(kernel, axes).reshape(-1, k))
    return y_mn.reshape(*x.shape[: x.ndim - axes], *kernel.shape[axes:])


def product_with_rows(x: Array, table_nk: Array) -> Array:
    """x · tableᵀ, over the last axis of both."""
    if not is_for_cpu():
        return jnp.einsum("...k,nk->...n", x, table_nk)
    # XLA would widen a 16-bit table once, whole, for this and for its use as an embedding
    alone_nk = barrier(table_nk)
    return _product(x.reshape(-1, x.shape[-1]), alone_nk).reshape(*x.shape[:-1], -1)


def query_key(q_btkgh: Array, k_bksh: Array) -> Array:
    """q · kᵀ of each query head with its group's keys: float32 [b, k, g, t, s]."""
    if not is_for_cpu():
        # the cache first: XLA then leaves the scores in their order, where the other way round it transposes them
        return jnp.einsum("bksh,btkgh->bkgts", k_bksh, q_btkgh, preferred_element_type=jnp.float32)
    b, t, k, g, h = q_btkgh.shape
    if g * t <= FEW:
        q_bkrh = _wide(q_btkgh).transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h)
        w_bkrs = jnp.moveaxis(_in_one_pass(jnp.moveaxis(q_bkrh, 2, 0)[:, :, :, None], _wide(k_bksh)), 0, 2)
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
    p_bkrs = barrier(_wide(p_bkgts).reshape(b, k, g * t, s))
    if g * t <= FEW and v_bksh.dtype.itemsize < 4:
        a_bkrh = jnp.stack([(p_bkrs[:, :, r, :, None] * _wide(v_bksh)).sum(2) for r in range(g * t)], 2)
    else:
        a_bkrh = _dot(p_bkrs, _wide(v_bksh), 3, 2)
    return a_bkrh.reshape(b, k, g, t, -1).transpose(0, 3, 1, 2, 4)


def mean(x: Array) -> Array:
    """The mean over the last axis, which stays with a size of 1."""
    lanes = math.gcd(x.shape[-1], LANES)
    if not is_for_cpu() or lanes == 1:
        return x.mean(-1, keepdims=True)
    sums = barrier(x.reshape(*x.shape[:-1], -1, lanes).sum(-2))  # or XLA would join both sums
    return sums.sum(-1, keepdims=True) / x.shape[-1]


def outputs_first(kernel: AnyArray, axes: int) -> AnyArray:
    """A kernel [*inputs, *outputs] as [*outputs, *inputs], which is how a CPU reads it fastest."""
    return kernel.transpose(*range(axes, kernel.ndim), *range(axes))


def inputs_first(kernel: Array, axes: int) -> Array:
    """The inverse of `outputs_first`."""
    return outputs_first(kernel, kernel.ndim - axes)


def _product(x_mk: Array, w_nk: Array) -> Array:
    m, narrow, dtype = len(x_mk), w_nk.dtype.itemsize < 4, jnp.result_type(x_mk, w_nk)
    x_mk, w_nk = _wide(x_mk), _wide(w_nk)
    if m <= (4 * FEW if narrow else FEW) and (m > 1 or narrow):
        y_mn = jnp.concatenate([_in_one_pass(x_mk[i : i + FEW, None], w_nk) for i in range(0, m, FEW)])
    else:  # without the barrier XLA would make it x · wᵀ, and transpose the matrix first
        y_mn = barrier(w_nk @ x_mk.T).T
    return y_mn.astype(dtype)


def _in_one_pass(x: Array, w: Array) -> Array:
    """w · x[m] for each m, summed over the last axis, in one reduction that reads, and widens, w once."""
    m = len(x)
    if m == 1:  # a reduction of one result is read at half the rate
        x = jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1)))
    x = barrier(x)  # what makes it would be fused, and done again for each output
    zeros = tuple(jnp.zeros((), w.dtype) for _ in x)
    y = jax.lax.reduce(tuple(w * row for row in x), zeros, _add, (w.ndim - 1,))
    return (y[0] + y[1])[None] if m == 1 else jnp.stack(y)


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, a, b))


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """x · y over an axis of each, all but the last two in common; XLA neither swaps nor fuses it."""
    common = tuple(range(x.ndim - 2))
    return barrier(jax.lax.dot_general(barrier(x), y, (((x_axis,), (y_axis,)), (common, common))))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
