"""Values that are made when they are first asked for."""

from collections.abc import Callable
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """A value that the first call makes, while other threads wait. Where making it fails, the next call tries again."""

    def __init__(self, make: Callable[[], T]):
        self._make, self._lock = make, RLock()
        self._values: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._values:
                self._values.append(self._make())
            return self._values[0]

    @property
    def made(self) -> bool:
        """Whether there is a value yet."""
        return bool(self._values)

    def set(self, value: T) -> None:
        """Takes `value` for the one to be made, or in place of the one that was."""
        with self._lock:
            self._values = [value]
