"""Entries of a state table that are stored in fewer bits than they are computed with.

They are cast, or int8 codes with a scale for each vector along the last axis: x ≈ scale · code, scale = max |x| / 127.
A scale multiplies what a dot with its codes gives, so that these are widened where they are read.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

StateDtype = Literal["float32", "int8", "float8_e4m3", "float16", "bfloat16"]
"""The dtypes of stored entries. Every Neuron device has float8_e4m3, with numbers within ±240."""

STEP = 1 / 127
"""Of int8 codes, in units of the greatest number; a factor, since XLA may or may not divide by its inverse."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Encoded:
    """Entries [..., s, h] as they are stored.

    codes: [..., s, h].
    scale: float32 [..., s]; None where the codes are the numbers.
    dtype: of the entries, decoded.
    """

    codes: Array
    scale: Array | None
    dtype: Any

    @classmethod
    def of(cls, x: Array, stored: Any, dtype: Any) -> "Encoded":
        """Entries x, stored in one of `StateDtype`. Numbers beyond those of float8_e4m3 become its greatest."""
        stored = jnp.dtype(stored)
        if stored == jnp.int8:
            wide = x.astype(jnp.float32)
            scale = jnp.abs(wide).max(-1) * STEP
            codes = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
            return cls(codes.astype(stored), scale, dtype)
        if stored.itemsize == 1:
            most = float(jnp.finfo(stored).max)
            x = jnp.clip(x, -most, most)
        return cls(x.astype(stored), None, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return tuple(self.codes.shape)

    def __getitem__(self, index: Any) -> "Encoded":
        """Entries at an index of axes up to s."""
        return jax.tree.map(lambda x: x[index], self)


Entries = Array | Encoded


def codes(x: Entries) -> Array:
    """Numbers that differ from the entries by their scale alone, in the dtype that they are stored in."""
    return x.codes if isinstance(x, Encoded) else x


def scaled(w_bkgts: Array, x_bksh: Entries) -> Array:
    """w, times the scale of each position of each head of x."""
    if isinstance(x_bksh, Encoded) and x_bksh.scale is not None:
        return w_bkgts * x_bksh.scale[:, :, None, None]
    return w_bkgts


def decoded(x: Entries) -> Array:
    """The entries as numbers."""
    if not isinstance(x, Encoded):
        return x
    if x.scale is None:
        return x.codes.astype(x.dtype)
    return (x.codes.astype(jnp.float32) * x.scale[..., None]).astype(x.dtype)
