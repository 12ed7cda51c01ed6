"""Host memory: large pages, which a CPU reads a third faster; its release, its limit, and pauses of the collector."""

import ctypes
import gc
import math
import mmap
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.errors import InputError

CHUNK = 64 * 2**20  # bytes asked of the system at once
KEPT = 4 * 2**20  # bytes; malloc keeps up to twice that of what a thread frees: mallopt(3)
MEMORY, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
LARGE = 2**20  # bytes
M_MMAP_THRESHOLD = -3  # of malloc.h
ALIGNMENT = 64  # at which XLA takes an array's memory as it is


class Pages:
    """An arena of large pages. It grows as threads put arrays there, and is freed with the last of them.

    https://docs.kernel.org/admin-guide/mm/transhuge.html. Where the system has no large pages, small ones are used.
    """

    def __init__(self) -> None:
        self._chunk, self._used, self._lock = np.empty(0, np.uint8), 0, threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialized C-contiguous array in these pages."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + size > self._chunk.size:
                self._chunk, start = _pages(max(size, CHUNK)), 0
            self._used = start + size
            place = self._chunk[start : self._used]
        return place.view(dtype).reshape(shape)

    def clear(self) -> None:
        """Frees the arena for new arrays, which overwrite the old ones."""
        self._used = 0

    def put(self, array: np.ndarray) -> np.ndarray:
        """A copy of `array` in these pages, or `array` itself where `allocate` gave it large pages already."""
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
    """In this context, `allocate` reuses one arena of this thread, where malloc would keep the memory it freed."""
    if _scratch.again is None:
        _scratch.again = Pages()
        np.empty(KEPT, np.uint8)  # glibc raises its thresholds to KEPT when this is freed
    _scratch.pages = _scratch.again
    try:
        yield
    finally:
        _scratch.pages = None
        _scratch.again.clear()


def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialized array, in large pages where it has `CHUNK` bytes or more."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= CHUNK:
        return _pages(size).view(dtype).reshape(shape)
    return np.empty(shape, dtype) if _scratch.pages is None else _scratch.pages.empty(shape, dtype)


def _owner(array: np.ndarray) -> Any:
    """The object that owns an array's memory."""
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


def release_memory() -> None:
    """Returns freed memory to the system. glibc would keep tens of megabytes of each program's compilation."""
    _malloc("malloc_trim", 0)


@cache
def release_large_arrays() -> None:
    """Has malloc return arrays of `LARGE` bytes or more to the system as soon as they are freed.

    With the first of up to 32 MB, glibc would raise its threshold to that, and each thread keep twice as much.
    """
    _malloc("mallopt", M_MMAP_THRESHOLD, LARGE)


def _malloc(function: str, *arguments: int) -> None:
    """Calls a function of glibc's malloc, where this is it."""
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)) is not None:
        call(*arguments)


def memory_limit() -> int | None:
    """Bytes that a process may have: memory and swap, or its container's limit; None where neither is known."""
    try:
        sizes = re.findall(r"^(?:MemTotal|SwapTotal): *(\d+) kB", MEMORY.read_text(), re.MULTILINE)
    except OSError:
        return None
    total = 1024 * sum(map(int, sizes))
    try:
        return min(total, int(CONTAINER.read_text()))
    except (OSError, ValueError):  # "max"
        return total


def check_memory(size: int, what: str) -> None:
    """Raises InputError where `what`, of `size` bytes, is more than a process may have."""
    if (here := memory_limit()) is not None and size > here:
        raise InputError(f"{what} {gib(size)} of memory and there is {gib(here)} here; ask for less of one of them")


def count_text(count: int) -> str:
    """A number of parameters, in millions or billions.

    >>> count_text(134_515_008)
    '135 M'
    """
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def gib(size: float) -> str:
    """Bytes, for people."""
    gibs = size / 2**30
    return f"{gibs:.3g} GiB" if gibs < 999.5 else f"{gibs / 1024:.3g} TiB"


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses the garbage collector in this context: imports and traces make many objects, and all of them stay."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
