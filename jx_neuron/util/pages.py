"""Memory: in large pages, which a CPU reads a third faster; given back; how much there is; and its garbage."""

import ctypes
import gc
import math
import mmap
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.errors import InputError

CHUNK = 64 * 2**20  # bytes asked of the system at once
KEPT = 4 * 2**20  # bytes; of what is freed, a thread keeps twice that for what it asks for next: mallopt(3)
MEMORY, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
ALIGNMENT = 64  # at which XLA takes an array's memory as it is


class Pages:
    """Memory that grows as arrays are put there, by any thread, and is given back with the last of them.

    https://docs.kernel.org/admin-guide/mm/transhuge.html. Where the system has no large pages, it is of small ones.
    """

    def __init__(self) -> None:
        self._chunk, self._used, self._lock = np.empty(0, np.uint8), 0, threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array in these pages, its last axis innermost, not yet filled."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + size > self._chunk.size:
                self._chunk, start = _pages(max(size, CHUNK)), 0
            self._used = start + size
            place = self._chunk[start : self._used]
        return place.view(dtype).reshape(shape)

    def clear(self) -> None:
        """Lets what is put from now on take the place of what was."""
        self._used = 0

    def put(self, array: np.ndarray) -> np.ndarray:
        """A copy of `array` in these pages; itself, where `room` made it of a chunk's size or more."""
        if array.nbytes >= CHUNK and array.flags.c_contiguous and isinstance(_owner(array), _Large):
            return array
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy


class _Large(mmap.mmap):
    """Memory in large pages."""


class _Scratch(threading.local):
    pages: Pages | None = None
    again: Pages | None = None


_scratch = _Scratch()


@contextmanager
def scratch() -> Iterator[None]:
    """What `room` gives in this context and thread is in the same memory each time: malloc would keep what it had."""
    if _scratch.again is None:
        _scratch.again = Pages()
        np.empty(KEPT, np.uint8)  # when it is freed, glibc raises its thresholds to that
    _scratch.pages = _scratch.again
    try:
        yield
    finally:
        _scratch.pages = None
        _scratch.again.clear()


def room(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array, not yet filled, that is to be put in pages: a large one is there already."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= CHUNK:
        return _pages(size).view(dtype).reshape(shape)
    return np.empty(shape, dtype) if _scratch.pages is None else _scratch.pages.empty(shape, dtype)


def _owner(array: np.ndarray) -> Any:
    """What an array's memory belongs to."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def _pages(size: int) -> np.ndarray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    memory = _Large(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def give_back() -> None:
    """Gives freed memory back to the system, where glibc would keep it: tens of megabytes of each program's making."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def room_here() -> int | None:
    """Bytes that a process may have: memory and swap, or its container's limit; None where the system does not tell."""
    try:
        sizes = re.findall(r"^(?:MemTotal|SwapTotal): *(\d+) kB", MEMORY.read_text(), re.MULTILINE)
    except OSError:
        return None
    total = 1024 * sum(map(int, sizes))
    try:
        return min(total, int(CONTAINER.read_text()))
    except (OSError, ValueError):  # "max"
        return total


def check_room(size: int, what: str) -> None:
    """Raises InputError where `what`, of `size` bytes, is more than a process may have."""
    if (here := room_here()) is not None and size > here:
        raise InputError(f"{what} {gib(size)} of memory and there is {gib(here)} here; ask for less of one of them")


def gib(size: float) -> str:
    """Bytes, for people."""
    gibs = size / 2**30
    return f"{gibs:.3g} GiB" if gibs < 999.5 else f"{gibs / 1024:.3g} TiB"


@contextmanager
def uncollected() -> Iterator[None]:
    """In this context no garbage is looked for: what is imported and traced is many objects, all of which stay."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
