"""A model's weights with LoRA adapters: one merged into the tensors of a checkpoint, or several side by side."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.lora import MERGE, Adapter, Pair
from jx_neuron.checkpoint.row import Tensors, W, slices
from jx_neuron.checkpoint.weights import Source
from jx_neuron.errors import CheckpointError
from jx_neuron.nn.adapters import PARTS, Adapters
from jx_neuron.nn.sharding import Padding


@dataclass(frozen=True)
class Base:
    """The model that adapters are of.

    tensors:   those of its checkpoint.
    rows:      rows of the weight table that fill its parameters, alternatives too.
    matches:   those of `rows` that the checkpoint has tensors for, with its names.
    text_name: returns the name that a tensor of a multimodal model has in its text model; None for others.
    """

    tensors: Tensors
    rows: Iterable[W]
    matches: Sequence[W]
    config: HFConfig
    text_name: Callable[[str], str | None]

    def matrices(self, adapter: Adapter) -> Iterator[tuple[str, Pair, str, list[W]]]:
        """Of each matrix of an adapter its module, A and B, and the checkpoint's tensor with the rows that read it.

        Raises CheckpointError for a module that the model does not have, or has in other sizes.
        """
        places = self._places()
        names = {module: f"{module}.weight" for module in adapter.pairs}
        names = {module: self.text_name(name) or name for module, name in names.items()}
        if unknown := [module for module, name in names.items() if name not in places]:
            some = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
            raise CheckpointError(
                f"{adapter.path} has A and B of {some}, and the model has no such matrix of its own; is it an adapter "
                f"of another model? {MERGE}."
            )
        for module, pair in adapter.pairs.items():
            name, rows = places[names[module]]
            transposed, shape = rows[0].has_inputs_first, tuple(self.tensors.shape(name))
            if pair.shape != (shape[::-1] if transposed else shape):
                raise CheckpointError(
                    f"{adapter.path}: B·A of {module} is {list(pair.shape)}, [outputs, inputs], and the model's "
                    f"{name} {'[inputs, outputs]' if transposed else '[outputs, inputs]'} {list(shape)}; it is an "
                    "adapter of another model."
                )
            yield module, pair, name, rows

    def _places(self) -> dict[str, tuple[str, list[W]]]:
        """Of each name that HF has for a matrix: the checkpoint's name, and the rows that read it."""
        by_target, places = {row.target: row for row in self.matches}, dict[str, tuple[str, list[W]]]()
        for row in self.rows:
            match, sizes = by_target[row.target], row.sizes(self.config)
            if row.is_computed or not row.name.endswith(".weight") or len(row.source_shape(sizes)) != 2:
                continue
            if (row.axes, row.parts, row.part) == (match.axes, match.parts, match.part):
                for name, there in zip(row.names(sizes), match.names(sizes), strict=True):
                    places.setdefault(name, (there, []))[1].append(match)
        return places


@dataclass(frozen=True)
class Merged:
    """Tensors of a checkpoint, of which some have something added, in float32."""

    tensors: Tensors
    added: Mapping[str, Callable[[], np.ndarray]]

    def names(self) -> Iterable[str]:
        """The names of the tensors."""
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor."""
        array = self.tensors.read(name)
        return array.astype(np.float32) + self.added[name]() if name in self.added else array

    def slices(self, name: str) -> Iterator[np.ndarray]:
        """The same in parts along its first axis, where it can be read so and nothing is added to it."""
        return iter([self.read(name)]) if name in self.added else slices(self.tensors, name)


def merged(adapter: Adapter, base: Base) -> Merged:
    """A checkpoint's tensors with an adapter merged into them. Raises CheckpointError where it does not fit."""
    added = {
        name: _transposed(pair.product) if rows[0].has_inputs_first else pair.product
        for _, pair, name, rows in base.matrices(adapter)
    }
    return Merged(base.tensors, added)


def _transposed(product: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: product().T


@dataclass(frozen=True)
class SideBySide:
    """Adapters that a model has side by side, and A and B of each matrix, by its path and the adapter's number."""

    adapters: Adapters
    pairs: Mapping[str, Mapping[int, Pair]]
    base: Base

    def source(self, source: Source, padding: Padding, dtype: np.dtype[Any]) -> Source:
        """`source`, with A and B of every adapter: zeros for a matrix that it does not change, and behind its rank."""
        config, rows = self.base.config, {row.target: row for row in self.base.matches}
        matrices = {
            row.target: (path, row)
            for path in self.adapters.paths(rows, config.layers)
            for row in rows[path].low_rank() or ()
        }

        def read(name: str) -> np.ndarray:
            if name not in matrices:
                return source.read(name)
            path, row = matrices[name]
            sizes = row.sizes(config) | self.adapters.sizes
            whole = np.zeros(row.source_shape(sizes), np.float32)
            for number, pair in self.pairs.get(path, {}).items():
                array = pair.a.load() if name.endswith(PARTS[0]) else pair.scaled_b()
                whole[number, : array.shape[0], : array.shape[1]] = array
            return row.pad(row.laid_out([whole], sizes), padding).astype(row.dtype(dtype), copy=False)

        def split(name: str) -> PartitionSpec:
            return matrices[name][1].partition if name in matrices else source.split(name)

        def name(path: str) -> str:
            if path not in matrices:
                return source.name(path)
            return f"{path.rpartition('.')[2]} of {matrices[path][1].name}"

        return replace(source, paths=[*source.paths, *matrices], read=read, split=split, name=name)


def side_by_side(named: Mapping[str, Adapter], base: Base, adaptable: Collection[str]) -> SideBySide:
    """Adapters by name, to be computed next to the matrices that they are of, some of `adaptable`.

    Raises CheckpointError where one does not fit, or is of another matrix.
    """
    pairs, targets = defaultdict[str, dict[int, Pair]](dict), dict[str, None]()
    for number, adapter in enumerate(named.values(), 1):
        for module, pair, _, rows in base.matrices(adapter):
            if not all(row.target in adaptable for row in rows):
                raise CheckpointError(
                    f"{adapter.path} has A and B of {module}, which takes no adapters side by side: legal are matrices "
                    "of one tensor, by which the model multiplies. Merge it (adapter=, --adapter), alone."
                )
            for row in rows:
                pairs[row.target][number] = pair
                targets[row.target.replace(f".{row.layer}.", ".{i}.", 1)] = None
    rank = max(pair.a.shape[0] for of_matrix in pairs.values() for pair in of_matrix.values())
    return SideBySide(Adapters(tuple(named), rank, tuple(sorted(targets))), pairs, base)
