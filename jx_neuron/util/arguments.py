"""Validation of users' arguments: flags, and numbers of Python, numpy, jax and torch, one or several."""

import math
import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jx_neuron.errors import InputError, JxNeuronError

FLOAT32 = np.finfo(np.float32)


def plain(value: Any) -> Any:
    """Arrays and scalars of numpy, jax and torch as lists and numbers of Python; anything else as it is.

    Raises InputError for an array whose data cannot be read, such as torch's of the meta device, or a deleted one.

    >>> plain(np.arange(3, dtype=np.int16))
    [0, 1, 2]
    """
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except RuntimeError as error:
        raise InputError(f"an array cannot be read: {error}") from error


def integer(
    name: str, value: Any, *, least: int = 1, most: int | None = None, error: type[JxNeuronError] = InputError
) -> int:
    """`value` as an int from `least` to `most`. Raises `error` that names it for anything else, also 2.0 and True.

    >>> integer("batch_size", np.int64(4))
    4
    """
    try:
        number = None if isinstance(one := plain(value), bool) else operator.index(one)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise error(f"{name}={shown(value)} is not legal; it takes {_range('an integer', least, most)}")
    return number


def real(
    name: str,
    value: Any,
    *,
    least: float = float(FLOAT32.min),
    most: float = float(FLOAT32.max),
    above: float | None = None,
    error: type[JxNeuronError] = InputError,
) -> float:
    """`value` as a float whose float32 is from `least`, or `above` a bound, to `most`; never NaN.

    Raises `error` that names it for anything else. By default every value finite in float32 is legal. Subnormal values
    count as 0, since devices flush them.
    """
    try:
        if isinstance(one := plain(value), bool | str | bytes):
            raise TypeError
        number = float(one)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    with np.errstate(over="ignore"):
        single = float(np.float32(number))
    single = 0.0 if abs(single) < FLOAT32.tiny else single
    if not least <= single <= most or (above is not None and single <= above):
        what = "a finite number, or -inf" if least == -math.inf else "a finite number"
        raise error(f"{name}={shown(value)} is not legal; it takes {_range(what, least, most, above)}")
    return number


def flag(name: str, value: Any, *, error: type[JxNeuronError] = InputError) -> bool:
    """`value` as a bool. Raises `error` that names it for anything else."""
    if not isinstance(one := plain(value), bool):
        raise error(f"{name}={shown(value)} is not legal; it is True or False")
    return one


def one_or_each(name: str, value: Any, read: Callable[..., Any], **legal: Any) -> Any:
    """read(value), or a tuple of `read` of each element where `value` is a sequence or an array.

    >>> one_or_each("eos_token_id", [5, 17], integer)
    (5, 17)
    """
    several = plain(value)
    if isinstance(several, Sequence) and not isinstance(several, str | bytes) and several:
        return tuple(read(name, one, **legal) for one in several)
    return read(name, several, **legal)


def integers(
    name: str, value: Any, *, least: int = 1, most: int | None = None, error: type[JxNeuronError] = InputError
) -> list[int]:
    """One integer or several, as a list of at least one."""
    numbers = one_or_each(name, value, integer, least=least, most=most, error=error)
    return list(numbers) if isinstance(numbers, tuple) else [numbers]


def per_row(name: str, value: Any, rows: int, read: Callable[..., Any]) -> list[Any]:
    """A list of `rows` values, `read` from one value for all rows or one a row."""
    values = one_or_each(name, value, read)
    if not isinstance(values, tuple):
        return [values] * rows
    if len(values) != rows:
        raise InputError(f"{name}={shown(value)} is not legal; it takes one value for all rows, or {rows}, one a row")
    return list(values)


def shown(value: Any) -> str:
    """repr of a value for an error message, truncated where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # https://docs.python.org/3/library/stdtypes.html#integer-string-conversion-length-limitation
        return "an integer of thousands of digits"


def _range(what: str, least: float, most: float | None, above: float | None = None) -> str:
    low, high = least > FLOAT32.min, most is not None and most < FLOAT32.max
    if above is not None:
        return f"{what} above {above} and at most {most}" if high else f"{what} above {above}"
    if low and high:
        return f"{what} from {least} to {most}"
    return f"{what} of {least} or more" if low else f"{what} of at most {most}" if high else what
