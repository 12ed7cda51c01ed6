"""Memory for weights: copies that a device takes as they lie."""

import gc
import mmap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jx_neuron.checkpoint.weights import Source
from jx_neuron.nn import sharding
from jx_neuron.util.pages import ALIGNMENT, CHUNK, Pages, allocate, gc_paused, scratch

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])
def test_what_is_put_is_a_copy_in_its_own_place(dtype) -> None:
    pages, rng = Pages(), np.random.default_rng(0)
    arrays = [rng.integers(0, 99, shape).astype(jnp.dtype(dtype)) for shape in ((3, 5), (7,), (2, 3, 4), (), (0, 2))]
    arrays.append(arrays[2].transpose(2, 0, 1))
    copies = [pages.put(array) for array in arrays]
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(copy, array)
        assert copy.flags.c_contiguous
        assert copy.ctypes.data % ALIGNMENT == 0
        assert not np.shares_memory(copy, array)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(copies) for b in copies[:i])


def test_an_array_larger_than_a_chunk_has_a_chunk_of_its_own() -> None:
    pages = Pages()
    small, large = pages.put(np.ones(3)), pages.put(np.ones(CHUNK // 8 + 1))
    assert large.sum() == CHUNK // 8 + 1
    assert small.sum() == 3


def test_a_device_takes_them_without_another_copy() -> None:
    pages = Pages()
    values = {name: np.arange(n, dtype=np.float32) for name, n in (("a", 5), ("b", 70_000), ("c", 3))}
    source = Source(list(values), values.__getitem__, lambda path: jax.sharding.PartitionSpec())
    put: dict[str, np.ndarray] = {}  # two threads call

    def kept(name: str, array: np.ndarray) -> np.ndarray:
        return put.setdefault(name, pages.put(array))

    placed = source.place(sharding.mesh(1), put=kept)
    addresses = {name: array.unsafe_buffer_pointer() for name, array in placed.items()}
    assert addresses == {name: array.ctypes.data for name, array in put.items()}


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not SWITCH.is_file() or "[never]" in SWITCH.read_text(),
    reason="the system has no large pages",
)
def test_the_pages_are_large() -> None:
    def large() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))

    before = large()
    held = Pages().put(np.ones(CHUNK, np.uint8))
    assert large() - before > CHUNK // 2
    assert held.all()


def test_a_large_room_is_in_pages_already() -> None:
    pages = Pages()
    large, small = allocate((CHUNK // 4,), "float32"), allocate((3, 5), "float32")
    large[...], small[...] = 2, 3
    assert large.ctypes.data % ALIGNMENT == 0
    assert np.shares_memory(pages.put(large.reshape(2, -1)), large)
    for other in (small, large[:10], large[::2], large.reshape(2, -1).T):
        copy = pages.put(other)
        assert not np.shares_memory(copy, other)
        np.testing.assert_array_equal(copy, other)


def test_a_scratch_is_the_same_memory_each_time_and_each_thread_s_own() -> None:
    def rooms() -> list[int]:
        found = []
        for _ in range(2):
            with scratch():
                found += [allocate(shape, "float32").ctypes.data for shape in ((3, 5), (7,))]
        return found

    places: list[list[int]] = []
    both = threading.Barrier(2)

    def work() -> None:
        places.append(rooms())
        both.wait()  # or the second thread may be given the first one's memory

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in places:
        assert found[:2] == found[2:]
        assert len(set(found)) == 2
    assert not set(places[0]) & set(places[1])
    outside = [allocate((3, 5), "float32") for _ in range(2)]
    assert not np.shares_memory(*outside)


def test_what_is_read_through_a_scratch_is_placed_whole() -> None:
    rng = np.random.default_rng(0)
    values = {f"{i:02}": rng.normal(size=(50, 30)).astype(np.float32) for i in range(20)}

    def read(path: str) -> np.ndarray:
        array = allocate((50, 30), np.float32)
        array[...] = values[path]
        return array

    source = Source(list(values), read, lambda path: jax.sharding.PartitionSpec())
    pages = Pages()
    for put in (None, lambda _, array: pages.put(array)):
        placed = source.place(sharding.mesh(1), put=put)
        for path, array in placed.items():
            np.testing.assert_array_equal(array, values[path])


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_looked_for_again_after(collects) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with gc_paused():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
        with pytest.raises(InterruptedError), gc_paused():
            raise InterruptedError
        assert gc.isenabled() is collects
    finally:
        (gc.enable if was else gc.disable)()
