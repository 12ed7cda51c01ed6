"""Memory for weights: copies that a device takes as they lie."""

import mmap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jx_neuron import sharding
from jx_neuron.pages import ALIGNMENT, CHUNK, Pages
from jx_neuron.weights import Source

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
    put = []

    def kept(name: str, array: np.ndarray) -> np.ndarray:
        put.append(pages.put(array))
        return put[-1]

    placed = source.place(sharding.mesh(1), put=kept)
    assert [array.unsafe_buffer_pointer() for array in placed.values()] == [copy.ctypes.data for copy in put]


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
