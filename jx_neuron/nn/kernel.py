"""How a weight matrix is stored: as an array [*inputs, *outputs], or in a form whose type says how it is multiplied."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array


class Kernel(Protocol):
    """A stored matrix, or several of one input: a pytree in the place of a parameter's array."""

    def matmul(self, x: Array) -> list[Array]:
        """x · W over the last axes of x and the inputs of W: [*rows, *outputs] of each matrix that it holds."""
        ...

    def __getitem__(self, index: Any) -> Array:
        """Entries of the matrix as an array [*inputs, *outputs]."""
        ...


class Indexed(ABC):
    """A kernel of which a loop over layers takes no part, for it would be a copy, but says which layer's it is."""

    @abstractmethod
    def of_period(self, number: Array | int) -> "Indexed":
        """The part of `number` along the first axis, along which `Layers` stacks parameters."""


def matmul(x: Array, kernel: Array | Kernel, axes: int) -> Array:
    """x · W over the last `axes` axes of x and the first of W."""
    if isinstance(kernel, Array):
        return jnp.tensordot(x, kernel, axes=axes)
    (y,) = kernel.matmul(x)
    return y


def outputs_first(kernel: Any, axes: int) -> Any:
    """A matrix [*inputs, *outputs] with `axes` input axes as [*outputs, *inputs]; numpy's or JAX's, as it is given."""
    return kernel.transpose(*range(axes, kernel.ndim), *range(axes))


def inputs_first(kernel: Array, axes: int) -> Array:
    """The inverse of `outputs_first`."""
    return jnp.moveaxis(kernel, range(-axes, 0), range(axes))
