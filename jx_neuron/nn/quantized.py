"""Weights in 8 and 4 bits: codes, and the scales that they are multiplied by.

    int8, fp8:  x · W = (x · codes) · scales, a scale an output channel
    int4:       x · W = x · (codes · scales + offsets), a scale and an offset a group of inputs

Codes of int8 are integers within ±127, of fp8 float8_e4m3 within ±240, and of int4 0 to 15, two in a byte: the low bits
have a group's, and the high bits those of the group behind it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

CODES: dict[str, Any] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3, "int4": np.uint8}
MOST = {"int8": 127.0, "fp8": 240.0}
"""The code of the largest magnitude of a channel."""

LEGAL = {"int8": (-128, 127), "int4": (0, 15), "symmetric int4": (-8, 7)}
NO_OFFSET = np.zeros((), np.float32)

STEPS = (15.0, 15.7, 16.4)
"""Steps of a scale that the numbers of a group of int4 are tried to span; what is beyond 15 is clipped."""

DIVISORS = (-8.0, -7.4, -8.8, 7.0, 7.6, 6.4)
"""Codes, with an offset of -8 scales, that the number of the largest magnitude in such a group is tried as."""

STORED = {"int8": (1.0,), "fp8": (1.0, 2.0)}
"""Factors to try on a checkpoint's scales: e4m3fn, which fp8 checkpoints have, reaches 448."""

SLICE = 2**20
"""Bytes of a matrix that are encoded at a time."""


@dataclass(frozen=True)
class Form:
    """How a matrix [*lead, *inputs, *outputs] is stored, or with `rows` a table [outputs, *inputs].

    lead, inputs: numbers of axes; each entry of the lead axes is a matrix of its own.
    group:        inputs of a group of int4, along the last input axis.
    cast:         scales are 1.
    result:       the dtype to which a scaled product is rounded; None for that of x.
    """

    kind: Literal["int8", "fp8", "int4"]
    inputs: int
    lead: int = 0
    group: int = 0
    rows: bool = False
    cast: bool = False
    result: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the arrays of a matrix."""
        return ("codes", "scales", "offsets") if self.kind == "int4" else ("codes", "scales")

    def shapes(self, shape: tuple[int, ...], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a matrix of `shape` in a model of `dtype`."""
        codes, scales = list(shape), [n for axis, n in enumerate(shape) if axis not in self.contracted]
        scale: Any = dtype if self.rows else np.float32
        if self.kind == "int4":
            axis, scales, scale = self.contracted[-1], list(shape), np.float16
            codes[axis], scales[axis] = codes[axis] // 2, codes[axis] // self.group
        return {
            name: jax.ShapeDtypeStruct(tuple(codes), CODES[self.kind])
            if name == "codes"
            else jax.ShapeDtypeStruct(tuple(scales), scale)
            for name in self.parts
        }

    def partition(self, part: str, spec: PartitionSpec) -> PartitionSpec:
        """How an array of a matrix of partition `spec` is split: codes as it is, and others with their outputs, or
        groups; scales of a table are whole, for every core to scale the rows that it looks up."""
        if part == "codes" or self.kind == "int4":
            return spec
        if self.rows:
            return PartitionSpec()
        return PartitionSpec(*(name for axis, name in enumerate(spec) if axis not in self.contracted))

    def encode(
        self, matrix: np.ndarray, dtype: Any, stored: tuple[np.ndarray, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of a matrix in float32, for a model of `dtype`; temporary arrays are of `SLICE` bytes.

        stored: the scale and the offset that a checkpoint has for each number. They are kept where no others have a
        lesser error, so where this form can express them.
        """
        axis = 0 if self.rows or self.lead else -1
        count = min(matrix.shape[axis], 1 + matrix.nbytes // SLICE)
        arrays = {name: np.empty(part.shape, part.dtype) for name, part in self.shapes(matrix.shape, dtype).items()}
        of_slices = {name: np.array_split(array, count, axis) for name, array in arrays.items()}
        for number, part in enumerate(
            zip(*(np.array_split(a, count, axis) for a in (matrix, *(stored or ()))), strict=True)
        ):
            for name, array in self._encode(dtype, *part).items():
                of_slices[name][number][...] = array
        return arrays

    def _encode(self, dtype: Any, matrix: np.ndarray, *stored: np.ndarray) -> dict[str, np.ndarray]:
        wide = matrix.astype(np.float32, copy=False)
        if self.kind == "int4":
            return dict(zip(self.parts, self._encode_groups(wide, *stored), strict=True))
        scale: Any = dtype if self.rows else np.float32
        axes = self.contracted
        scales = np.abs(_largest(wide, axes)) / np.float32(MOST[self.kind])
        if self.cast:
            scales = np.ones_like(scales)
        elif stored:
            kept = _largest(stored[0], axes)
            tried = [(kept * np.float32(factor), NO_OFFSET) for factor in STORED[self.kind]] + [(scales, NO_OFFSET)]
            scales, _ = _least_error(self.kind, wide, axes, tried, np.dtype(scale))
        scales = scales.astype(scale)
        codes = _nearest(self.kind, wide, scales.astype(np.float32), NO_OFFSET)
        return {"codes": codes.astype(CODES[self.kind]), "scales": np.squeeze(scales, axes)}

    def _encode_groups(self, wide: np.ndarray, *stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes of 4 bits, two in a byte, scales and offsets."""
        axis = self.contracted[-1]
        split, *kept = (a.reshape(*a.shape[:axis], -1, self.group, *a.shape[axis + 1 :]) for a in (wide, *stored))
        low, high = split.min(axis + 1, keepdims=True), split.max(axis + 1, keepdims=True)
        tried = [(_largest(kept[0], axis + 1), _largest(kept[1], axis + 1))] if kept else []
        tried += [((high - low) / steps, low + (high - low) * (steps - 15) / (2 * steps)) for steps in STEPS]
        tried += [(scale, -8 * scale) for scale in _symmetric(split, axis + 1)]
        scales, offsets = _least_error("int4", split, axis + 1, tried, np.dtype(np.float16))
        codes = _nearest("int4", split, scales, offsets).astype(np.uint8)
        pairs = codes.reshape(*split.shape[:axis], -1, 2, *split.shape[axis + 1 :])
        even, odd = np.take(pairs, 0, axis + 1), np.take(pairs, 1, axis + 1)
        shape = *wide.shape[:axis], wide.shape[axis] // 2, *wide.shape[axis + 1 :]
        scales, offsets = (np.squeeze(array, axis + 1).astype(np.float16) for array in (scales, offsets))
        return (even | odd << 4).reshape(shape), scales, offsets

    @property
    def contracted(self) -> tuple[int, ...]:
        """The axes over which a product sums."""
        first = 1 if self.rows else self.lead
        return tuple(range(first, first + self.inputs))


def symmetric_codes(
    split: np.ndarray, axis: int, dtype: Any, stored: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes -8 to 7 of groups along `axis`, and a scale in `dtype` a group, without offsets.

    stored: the scale that a checkpoint has for each number, as Form.encode takes it.
    """
    kept = [] if stored is None else [_largest(stored, axis)]
    kind, tried = "symmetric int4", [(scale, NO_OFFSET) for scale in (*kept, *_symmetric(split, axis))]
    scales, offsets = _least_error(kind, split, axis, tried, np.dtype(dtype))
    return _nearest(kind, split, scales, offsets), np.squeeze(scales, axis).astype(dtype)


def _symmetric(split: np.ndarray, axis: int) -> Iterator[np.ndarray]:
    """Scales by which the number of the largest magnitude is one of DIVISORS."""
    largest = _largest(split, axis)
    return (largest / np.float32(divisor) for divisor in DIVISORS)


def _largest(array: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """The number of the largest magnitude, float32; of -x and x, -x."""
    low, high = (reduced(array, axis=axes, keepdims=True).astype(np.float32) for reduced in (np.min, np.max))
    return np.where(-low < high, high, low)


def _least_error(
    kind: str,
    split: np.ndarray,
    axes: int | tuple[int, ...],
    tried: Iterable[tuple[np.ndarray, np.ndarray]],
    dtype: np.dtype[Any],
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and offsets, rounded to `dtype`, whose squared error is least; of equals the first."""
    shape = np.min(split, axis=axes, keepdims=True).shape
    best, scales, offsets = np.full(shape, np.inf, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for numbers in tried:
        with np.errstate(over="ignore", invalid="ignore"):  # a checkpoint's scale may be beyond `dtype`
            scale, offset = (array.astype(dtype).astype(np.float32) for array in numbers)
            decoded = _nearest(kind, split, scale, offset) * scale + offset
            error = np.square(decoded - split).sum(axes, keepdims=True)
        better = error < best
        scales, offsets = np.where(better, scale, scales), np.where(better, offset, offsets)
        best = np.where(better, error, best)
        if not best.any():
            break
    return scales, offsets


def _nearest(kind: str, wide: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The code whose number is nearest, float32; 0 where a scale is 0."""
    moved = wide - offsets if offsets.any() else wide
    codes = np.divide(moved, scales, out=np.zeros_like(wide), where=scales != 0)
    if kind == "fp8":
        return codes.astype(CODES[kind]).astype(np.float32)
    return np.clip(np.rint(codes, out=codes), *LEGAL[kind], out=codes)


class Quantized(nnx.Module):
    """A matrix as the arrays of a `form`, in the place of a parameter."""

    codes: Any
    scales: Any
    offsets: Any  # of int4

    def __init__(self, form: Form, **parts: Any):
        self.form = form
        for name in form.parts:
            setattr(self, name, nnx.Param(parts.get(name)))

    def get_value(self) -> "Quantized":
        """Itself, as a parameter gives its array."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        shape = list(self.codes.get_value().shape)
        if self.form.kind == "int4":
            shape[self.form.contracted[-1]] *= 2
        return tuple(shape)

    def matmul(self, x: Array) -> list[Array]:
        """x · W over the last axes of x and the inputs of W, rounded to the form's `result`, or else the dtype of x."""
        form, dtype = self.form, jnp.dtype(self.form.result or x.dtype)
        if form.kind == "int4":
            return [jnp.tensordot(x, self.widened(x.dtype), axes=form.inputs).astype(dtype)]
        # in float16, sums of codes would overflow
        sums = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        y = jnp.tensordot(x, self.codes[...].astype(x.dtype), axes=form.inputs, preferred_element_type=sums)
        return [(y.astype(jnp.float32) * self.scales[...]).astype(dtype)]

    def widened(self, dtype: Any, part: Callable[[Array], Array] = lambda array: array) -> Array:
        """The matrix in `dtype`, of the entries of lead axes that `part` takes."""
        form = self.form
        codes, *factors = (part(getattr(self, name)[...]) for name in form.parts)
        axes = tuple(axis + codes.ndim - self.codes.ndim for axis in form.contracted)
        if form.kind == "int4":
            scales, offsets = factors
            return unpack(codes, scales, offsets, axes[-1], dtype)
        (scales,) = factors
        return codes.astype(dtype) * jnp.expand_dims(scales, axes).astype(dtype)

    def rows(self, index: Array) -> Array:
        """Rows of a table."""
        codes, scales = (array.at[index].get(mode="clip") for array in (self.codes[...], self.scales[...]))
        return codes.astype(scales.dtype) * scales[..., None]


def unpack(codes: Array, scales: Array, offsets: Array, axis: int, dtype: Any) -> Array:
    """The matrix of codes of 4 bits, two in a byte along `axis`, and a scale and an offset a group."""
    before, after, groups = codes.shape[:axis], codes.shape[axis + 1 :], scales.shape[axis]
    pairs = codes.reshape(*before, groups // 2, -1, *after)
    low_high = jnp.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis + 1).reshape(*before, groups, -1, *after)
    scales, offsets = (jnp.expand_dims(array, axis + 1).astype(dtype) for array in (scales, offsets))
    return (low_high.astype(dtype) * scales + offsets).reshape(*before, -1, *after)
