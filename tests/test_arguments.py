"""One reading of numbers: what is taken for one, whoever's type it has, and what is not."""

import math
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from jx_neuron import InputError
from jx_neuron.errors import ConfigError
from jx_neuron.util.arguments import flag, integer, integers, one_or_each, per_row, real

FOUR = [4, np.int8(4), np.uint64(4), np.array(4), jnp.array(4), torch.tensor(4), torch.tensor(4, dtype=torch.uint8)]
NO_INTEGER = [
    2.0, 2.5, math.nan, "2", b"2", None, True, np.True_, np.float32(2), np.array(2.0), jnp.array(True), [2], (), {},
    np.array([2]), torch.tensor(2.0), torch.tensor(True), torch.tensor([2]), Decimal(2), 2j, object(), 10**5000,
]  # fmt: skip
NO_NUMBER = [
    "1",
    b"1",
    None,
    True,
    np.False_,
    math.nan,
    math.inf,
    -math.inf,
    np.float32("nan"),
    1e39,
    10**5000,
    1j,
    [1.0],
]


@pytest.mark.parametrize("value", FOUR, ids=repr)
def test_integers_of_every_kind(value: object) -> None:
    assert integer("batch_size", value) == 4
    assert type(integer("batch_size", value)) is int
    assert integers("batch_size", value) == [4]


@pytest.mark.parametrize("value", NO_INTEGER, ids=lambda value: type(value).__name__)
def test_what_is_no_integer_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size=.* is not legal; it takes an integer from 1 to 9$"):
        integer("batch_size", value, most=9, error=ConfigError)


@pytest.mark.parametrize(
    "value",
    [[4, 5], (4, 5), range(4, 6), np.array([4, 5], np.uint8), jnp.array([4, 5]), torch.tensor([4, 5])],
    ids=repr,
)
def test_several_integers(value: object) -> None:
    assert integers("batch_size", value) == [4, 5]
    assert one_or_each("batch_size", value, integer) == (4, 5)
    assert per_row("top_k", value, 2, integer) == [4, 5]
    with pytest.raises(InputError, match="3, one a row"):
        per_row("top_k", value, 3, integer)


@pytest.mark.parametrize(
    "value", [[], [4, 2.5], [[4], [5]], [[4], [5, 6]], {4: 5}, {4, 5}, "45", np.array([4.0, 5.0])], ids=repr
)
def test_what_are_no_integers(value: object) -> None:
    with pytest.raises(InputError, match=r"^batch_size=.* is not legal; it takes an integer of 1 or more$"):
        integers("batch_size", value)


@pytest.mark.parametrize(
    "value",
    [0.5, np.float16(0.5), ml_dtypes.bfloat16(0.5), np.array(0.5), jnp.array(0.5), torch.tensor(0.5), Fraction(1, 2)],
    ids=repr,
)  # fmt: skip
def test_numbers_of_every_kind(value: object) -> None:
    assert real("top_p", value, above=0, most=1) == 0.5
    assert type(real("top_p", value)) is float


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_named(value: object) -> None:
    with pytest.raises(InputError, match=r"^top_p=.* is not legal; it takes a finite number above 0 and at most 1$"):
        real("top_p", value, above=0, most=1)


def test_bounds_are_those_of_float32() -> None:
    assert real("x", 1e38) == 1e38
    assert real("x", 0.1) == 0.1
    assert real("x", 1 + 1e-12, most=1) == 1 + 1e-12  # 1 in float32
    assert real("x", -math.inf, least=-math.inf) == -math.inf
    for value in (0, 1e-50, 1e-40):  # 0 in float32, or where subnormal numbers are flushed
        with pytest.raises(InputError, match="above 0"):
            real("x", value, above=0)
        assert real("x", value, least=0) == value
    with pytest.raises(InputError, match="or -inf"):
        real("x", math.nan, least=-math.inf)


def test_flags() -> None:
    assert flag("dynamic", np.True_) is True
    for value in (1, "yes", None, [True]):
        with pytest.raises(InputError, match=r"dynamic=.* True or False"):
            flag("dynamic", value)
