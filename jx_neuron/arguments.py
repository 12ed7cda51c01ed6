"""One reading of the numbers that a user gives: Python's, numpy's, and arrays of one; never a bool or a text."""

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from jx_neuron.errors import InputError, JxNeuronError


def integer(
    name: str, value: Any, *, least: int = 1, most: int | None = None, error: type[JxNeuronError] = InputError
) -> int:
    """`value` as an int from `least` to `most`. Raises `error` that names it for anything else, 2.0 and True among it.

    >>> integer("batch_size", np.int64(4))
    4
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise error(f"{name}={value!r} is not legal; it takes {_range('an integer', least, most)}")
    return number


def integers(
    name: str, value: Any, *, least: int = 1, most: int | None = None, error: type[JxNeuronError] = InputError
) -> list[int]:
    """One integer or several, as a list of at least one."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes) and np.ndim(value) != 0:  # type: ignore[arg-type]
        given = list(value)
        if given:
            return [integer(name, one, least=least, most=most, error=error) for one in given]
        raise error(f"{name}={value!r} is not legal; it takes {_range('an integer', least, most)}, or a list of them")
    return [integer(name, value, least=least, most=most, error=error)]


def real(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    error: type[JxNeuronError] = InputError,
) -> float:
    """`value` as a finite float from `least` to `most`. Raises `error` that names it for anything else."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not least <= number <= most:
        raise error(f"{name}={value!r} is not legal; it takes {_range('a finite number', least, most)}")
    return number


def _range(what: str, least: float, most: float | None) -> str:
    lowest, highest = least != -math.inf, most not in (None, math.inf)
    if lowest and highest:
        return f"{what} from {least} to {most}"
    return f"{what} of {least} or more" if lowest else f"{what} of at most {most}" if highest else what
