"""A core's part of each parameter, read without the rest of its tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import OPTIONS, numbered
from safetensors.numpy import save_file
from transformers import AutoConfig

from jx_neuron.checkpoint.tensor_files import safetensors_file
from jx_neuron.models import Decoder
from jx_neuron.nn.sharding import AXIS

CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


class Numbers:
    """Tensors of consecutive numbers, which count how many entries are read of each."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes, self.entries = shapes, 0

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        self.entries += np.prod(self.shapes[name], dtype=int)
        return np.arange(1.0, 1 + np.prod(self.shapes[name], dtype=int)).reshape(self.shapes[name])

    def part(self, name: str, axis: int, index_n: np.ndarray) -> np.ndarray:
        before, whole = self.entries, self.read(name)
        part = np.take(whole, index_n, axis)
        self.entries = before + part.size
        return part


def cases() -> Iterator[Any]:
    quick = {"llama-0"}
    for case, id in zip(CASES, numbered(CASES), strict=True):
        yield pytest.param(*case, id=id, marks=() if id in quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_of_every_family(name: str, options: dict[str, Any]) -> None:
    config = AutoConfig.for_model(name, **options).to_diff_dict() | {"model_type": name}
    for tp in (2, 3, 8):
        decoder = Decoder.from_config(config, tp)
        for row in decoder.rows:
            sizes = row.sizes(decoder.config)
            tensors = Numbers(dict.fromkeys(row.names(sizes), row.source_shape(sizes)))
            whole = row.pad(row.read(decoder.config, tensors), decoder.padding)
            tensors.entries = needed = 0
            axis = next((i for i, part in enumerate(row.partition) if part == AXIS), None)
            for core in range(tp):
                own = whole if axis is None else np.split(whole, tp, axis)[core]
                needed += np.count_nonzero(own)
                np.testing.assert_array_equal(row.core(decoder.config, tensors, decoder.padding, core), own, str(row))
            if axis is not None and not row.is_computed:
                assert tensors.entries <= needed, f"{row} is read further than is needed"


def test_a_part_of_a_file(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).normal(size=(1500, 1024)).astype(np.float32)  # more than a slice
    save_file({"w": whole}, tmp_path / "m.safetensors")
    tensor = safetensors_file(tmp_path / "m.safetensors")["w"]
    for axis, index_n in ((0, np.r_[3:90, 1020:1400]), (0, np.array([], int)), (1, np.r_[0:5, 700])):
        np.testing.assert_array_equal(tensor.part(axis, index_n), np.take(whole, index_n, axis))
