"""Values that are made once, when they are first asked for."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jx_neuron.util.once import Once


def test_threads_that_ask_together_get_one_value() -> None:
    made: list[int] = []

    def make() -> int:
        time.sleep(0.05)
        made.append(len(made))
        return made[-1]

    value = Once(make)
    assert not value.is_set
    with ThreadPoolExecutor(8) as threads:
        assert {*threads.map(lambda _: value(), range(8))} == {0}
    assert (made, value.is_set) == ([0], True)


def test_what_failed_is_made_anew_and_what_was_set_is_not_made() -> None:
    answers = iter([ValueError("too early"), "later"])

    def make() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    value = Once(make)
    with pytest.raises(ValueError, match="too early"):
        value()
    assert not value.is_set
    assert value() == "later"
    value.set("another")
    assert value() == "another"
    unasked = Once(make)
    unasked.set("given")
    assert unasked() == "given"
