"""Values computed on first use."""

from collections.abc import Callable
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """A value that the first call computes while other threads wait. Where that fails, the next call tries again."""

    def __init__(self, make: Callable[[], T]):
        self._make, self._lock = make, RLock()
        self._values: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._values:
                self._values.append(self._make())
            return self._values[0]

    @property
    def is_set(self) -> bool:
        """Whether the value has been computed."""
        return bool(self._values)

    def set(self, value: T) -> None:
        """Sets the value, whether or not it has been computed."""
        with self._lock:
            self._values = [value]
