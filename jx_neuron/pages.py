"""Memory for what a CPU reads again and again: in large pages, of which it reads a third more in the same time."""

import ctypes
import math
import mmap
import sys
from typing import Any

import numpy as np

CHUNK = 64 * 2**20  # bytes asked of the system at once
ALIGNMENT = 64  # at which XLA takes an array's memory as it is


class Pages:
    """Memory that grows as arrays are put there, and is given back with the last of them.

    https://docs.kernel.org/admin-guide/mm/transhuge.html. Where the system has no large pages, it is of small ones.
    """

    def __init__(self) -> None:
        self._chunk, self._used = np.empty(0, np.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array in these pages, its last axis innermost, not yet filled."""
        size = math.prod(shape) * dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > self._chunk.size:
            self._chunk, start = _pages(max(size, CHUNK)), 0
        self._used = start + size
        return self._chunk[start : self._used].view(dtype).reshape(shape)

    def put(self, array: np.ndarray) -> np.ndarray:
        """A copy of `array` in these pages."""
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy


def _pages(size: int) -> np.ndarray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def give_back() -> None:
    """Gives freed memory back to the system, where glibc would keep it: tens of megabytes of each program's making."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
