"""From the tensors of a checkpoint to the parameters of a model: each tensor has a row, and each row a tensor."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.row import REPLICATED, Tensors, W, slices
from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.nn.sharding import AXIS, Padding
from jx_neuron.util.ondemand import OnDemand
from jx_neuron.util.pages import Pages, release_large_arrays, scratch
from jx_neuron.util.progress import prefetch, track

__all__ = [
    "Copy",
    "Params",
    "Source",
    "Tensors",
    "W",
    "first_not_finite",
    "flatten",
    "from_checkpoint",
    "from_params",
    "match",
    "present",
    "rows_of",
]

Params = dict[str, Any]
"""A model's parameters by dotted path, such as "h.0.attn.c_attn.kernel": arrays, or kernels of jx_neuron.nn.kernel."""


@dataclass(frozen=True)
class Copy:
    """A tensor that a checkpoint may have besides the tensor `of` to which it is tied. The two must be equal."""

    name: str
    of: str


def flatten(module_or_state: Any) -> dict[str, Any]:
    """The parameters of an nnx module or state by dotted path, in order of path."""
    state = nnx.state(module_or_state, nnx.Param) if isinstance(module_or_state, nnx.Module) else module_or_state
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return dict(sorted(flat.items()))


def rows_of(table: Sequence[W], layers: int) -> Iterator[W]:
    """The rows of a weight table; a row with {i} gives one for each layer."""
    for row in table:
        yield from (row.at(i) for i in range(layers)) if "{i}" in row.target else (row,)


def present(table: Sequence[W], config: HFConfig, tensors: Tensors) -> dict[str, W]:
    """The rows, by target, that are computed or whose tensors a checkpoint has, with the checkpoint's names.

    HF's base prefix ("transformer.", "model.") may be absent, as it is in checkpoints of the headless class.

    Raises CheckpointError where the checkpoint has fewer layers or experts than the config, or tensors of other shapes
    than its `sizes` give. So a config's sizes are checked against the tensors before arrays of those sizes are made.
    """
    names, layers = set(tensors.names()), config.layers
    absent = tuple(p for p in _prefixes(table) if not any(name.startswith(p) for name in names))

    def spelled(row: W) -> W:
        prefix = next((p for p in absent if row.name.startswith(p)), "")
        return row if row.is_computed else replace(row, source=row.name.removeprefix(prefix))

    def has(row: W) -> bool:
        return any(name in names for name in islice(row.names(row.sizes(config)), len(names)))

    rows = [spelled(row) for row in table]
    of_layers = [row for row in rows if "{i}" in row.target]
    deep = next((i for i in range(layers) if not any(has(row.at(i)) for row in of_layers)), layers)
    if 0 < deep < layers:
        raise CheckpointError(f"the config calls for {layers} layers and the checkpoint has {deep}; {_OTHERS}")
    matches = {row.target: row for row in rows_of(rows, layers) if row.is_computed or has(row)}
    for row in matches.values():
        sizes = row.sizes(config)
        expected = row.source_shape(sizes)
        if missing := list(islice((name for name in row.names(sizes) if name not in names), 7)):
            raise CheckpointError(
                f"the config calls for {_stacked(row, sizes)} and the checkpoint lacks {_some(missing)}; {_OTHERS}"
            )
        for name in row.names(sizes):
            if (actual := tuple(tensors.shape(name))) != expected:
                raise CheckpointError(
                    f"tensor {name} has shape {list(actual)} and the config calls for {list(expected)}, by the "
                    f"layout {row.layout!r}; {_OTHERS}, or the layout is wrong"
                )
    return matches


def match(
    table: Sequence[W],
    ignore: Sequence[str | Copy],
    shapes: Mapping[str, tuple[int, ...]],
    config: HFConfig,
    tensors: Tensors,
) -> list[W]:
    """The row of each parameter, with the checkpoint's names, in order of those.

    Raises CheckpointError, which names each parameter without a tensor, or each tensor without a parameter (unless a
    regular expression or a `Copy` of `ignore` matches it, or it is a bias of zeros), and where `present` does.
    """
    rows = {row.target: row for row in rows_of(table, config.layers) if row.target in shapes}
    matches = {target: row for target, row in present(table, config, tensors).items() if target in rows}
    if missing := [row.name for target, row in rows.items() if target not in matches]:
        raise CheckpointError(f"the checkpoint lacks {_some(list(dict.fromkeys(missing)))}, which the config calls for")
    used_names = {name for row in matches.values() for name in row.names(row.sizes(config))}
    unused_names = set(tensors.names()) - used_names
    for copy in (entry for entry in ignore if isinstance(entry, Copy) and entry.name in unused_names):
        _check_copy(copy, next(name for name in used_names if copy.of.endswith(name)), tensors)
        unused_names.remove(copy.name)
    # AutoGPTQ and others write a bias of zeros for layers that have none
    unused_names -= {name for name in unused_names if name.endswith(".bias") and not tensors.read(name).any()}
    base = "|".join(map(re.escape, _prefixes(table)))
    ignored = [re.compile(rf"(?:{base})?(?:{pattern})") for pattern in ignore if isinstance(pattern, str)]
    if extra := [name for name in sorted(unused_names) if not any(p.fullmatch(name) for p in ignored)]:
        raise CheckpointError(
            f"the checkpoint holds {_some(extra)}, which no parameter takes; {_unclaimed(extra[0], table, config)}"
        )
    return sorted(matches.values(), key=lambda row: row.name)


_OTHERS = "config.json and weights are not of the same model"


def _stacked(row: W, sizes: Mapping[str, int]) -> str:
    return f"{sizes[row.stacked]} {'experts' if row.stacked == 'e' else 'heads'}"


def _prefixes(table: Sequence[W]) -> set[str]:
    return {row.name.split(".")[0] + "." for row in table if not row.is_computed and row.name.count(".") > 1}


def _unclaimed(name: str, table: Sequence[W], config: HFConfig) -> str:
    """Why no parameter takes the tensor `name`, and what to do."""

    def names(row: W) -> bool:
        return not row.is_computed and f".{row.of(index)}".endswith(f".{name}")

    index = next(iter(re.findall(r"\.(\d+)\.", name)[-1:]), "")
    row = next((row for row in rows_of(table, config.layers) if names(row)), None)
    if row is None:
        return (
            "config.json and weights are not of the same model, or the decoder forgets it: it needs a parameter in "
            "Model and a row in WEIGHTS, or a pattern in IGNORE"
        )
    sizes = row.sizes(config)
    if row.stacked and int(index) >= sizes[row.stacked]:
        return f"row {row} stacks the {_stacked(row, sizes)} that the config calls for; {_OTHERS}"
    return (
        f"row {row} names it, but Model has no parameter {row.target!r} with this config: config.json leaves it out, "
        "or Model does (a Linear with bias=False has no bias, a tied head no table of its own)"
    )


def _check_copy(copy: Copy, source: str, tensors: Tensors) -> None:
    pairs = zip(slices(tensors, copy.name), slices(tensors, source), strict=False)
    if tensors.shape(copy.name) != tensors.shape(source) or not all(np.array_equal(*pair) for pair in pairs):
        raise CheckpointError(
            f"the checkpoint's {copy.name} differs from {source}, and the config ties the two; "
            "set tie_word_embeddings to false in config.json if they are meant to differ"
        )


Packing = Mapping[str, tuple[Sequence[str], Callable[[Sequence[np.ndarray]], np.ndarray]]]
"""Path of a packed array → the paths of the parameters that it packs, and the function that packs their arrays."""


@dataclass(frozen=True)
class Source:
    """The source of a model's parameters, read one at a time: rearranged, padded and cast on the host.

    paths:  the parameters, in the order in which reading is fastest.
    read:   returns a whole parameter, in any memory order.
    split:  returns its partition.
    name:   returns its name in the checkpoint.
    slices: returns a whole parameter in parts along its first axis; None where all are read whole.
    core:   returns the part of a parameter that a core has, without reading more; None where all are read whole.
    affine: returns the scales and offsets that its numbers are stored with, or None, as Checkpoint.affine does.
    """

    paths: Sequence[str]
    read: Callable[[str], np.ndarray]
    split: Callable[[str], PartitionSpec]
    name: Callable[[str], str] = str
    slices: Callable[[str], Iterator[np.ndarray]] | None = None
    affine: Callable[[str, bool], tuple[np.ndarray, np.ndarray] | None] = lambda path, grouped: None
    core: Callable[[str, int], np.ndarray] | None = None

    def place(
        self,
        mesh: Mesh,
        packing: Packing | None = None,
        put: Callable[[str, np.ndarray], np.ndarray] | None = None,
    ) -> Params:
        """Places all parameters on the devices of `mesh`; the host holds only a few at a time.

        Arrays of `packing` replace the parameters that they pack, whole on every device. `put` copies the array of a
        path into memory that a device can use without a copy; two threads call it.
        """
        packing = packing or {}
        packed = {part: path for path, (parts, _) in packing.items() for part in parts}
        paths = list(dict.fromkeys(packed.get(path, path) for path in self.paths))

        def read(path: str) -> np.ndarray:
            with scratch() if put else nullcontext():
                if path in packing:
                    parts, pack = packing[path]
                    array = pack([self.read(part) for part in parts])
                else:
                    array = self.read(path)
                return put(path, array) if put else np.ascontiguousarray(array)

        placed: Params = {}
        arrays = zip(track(paths, "loading weights", len(paths)), prefetch(read, paths), strict=True)
        for path, array in arrays:
            sharding = NamedSharding(mesh, REPLICATED if path in packing else self.split(path))
            placed[path] = jax.device_put(array, sharding).block_until_ready()
        return dict(sorted(placed.items()))

    def place_own(self, mesh: Mesh, arrays: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
        """Places all parameters, of shapes and shardings `arrays`, on a mesh of several processes, of which each reads
        what its own devices take."""
        core_of = {device: core for core, device in enumerate(mesh.devices.flat)}
        release_large_arrays()
        pages = Pages()  # a CPU's devices use them without a copy

        def read(path: str) -> list[np.ndarray]:
            split, own = self.split(path), [core_of[device] for device in mesh.local_devices]
            if AXIS not in tuple(split):
                return [pages.put(self.read(path))] * len(own)
            if self.core is not None:
                return [pages.put(self.core(path, core)) for core in own]
            parts = np.split(self.read(path), mesh.size, tuple(split).index(AXIS))
            return [pages.put(parts[core]) for core in own]

        placed: Params = {}
        paths = track(self.paths, "loading weights", len(self.paths))
        for path, parts in zip(paths, prefetch(read, self.paths), strict=True):
            shards = [jax.device_put(part, device) for part, device in zip(parts, mesh.local_devices, strict=True)]
            array = arrays[path]
            placed[path] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
        return dict(sorted(placed.items()))

    def parts(self, tp_degree: int, own: range | None = None) -> Mapping[str, list[np.ndarray]]:
        """The parts of each parameter that the cores `own` have, or all, by path.

        A parameter is read at access, once for all cores.
        """
        cores = range(tp_degree) if own is None else own

        def read(path: str) -> list[np.ndarray]:
            whole = self.read(path)
            axis = next((axis for axis, name in enumerate(self.split(path)) if name), None)
            if axis is None:
                return [np.asarray(whole, order="C")] * len(cores)
            return [np.asarray(part, order="C") for part in np.split(whole, tp_degree, axis)[cores.start : cores.stop]]

        return OnDemand(sorted(self.paths), read)


def from_checkpoint(
    rows: Sequence[W], config: HFConfig, padding: Padding, tensors: Tensors, dtype: np.dtype[Any]
) -> Source:
    """The parameters of a checkpoint, by the rows that `match` gives."""
    by_path = {row.target: row for row in rows}

    def read(path: str) -> np.ndarray:
        row = by_path[path]
        return row.pad(row.read(config, tensors), padding).astype(row.dtype(dtype), copy=False)

    def affine(path: str, grouped: bool) -> tuple[np.ndarray, np.ndarray] | None:
        row = by_path[path]
        pair = row.affine(config, tensors, grouped)
        return pair and (row.pad(pair[0], padding), row.pad(pair[1], padding))

    def slices(path: str) -> Iterator[np.ndarray]:
        row = by_path[path]
        for part in row.slices(config, tensors):
            yield part.astype(row.dtype(dtype), copy=False)

    def split(path: str) -> PartitionSpec:
        return by_path[path].partition

    def name(path: str) -> str:
        return by_path[path].name

    def core(path: str, number: int) -> np.ndarray:
        row = by_path[path]
        return row.core(config, tensors, padding, number).astype(row.dtype(dtype), copy=False)

    return Source(list(by_path), read, split, name, None if padding.tp_degree > 1 else slices, affine, core)


def from_params(params: Mapping[str, Any], rows: Sequence[W], padding: Padding, dtype: np.dtype[Any]) -> Source:
    """A source of unpadded arrays. A parameter without a row is whole on every core.

    Raises ConfigError where cores share the model and a parameter has no row.
    """
    by_path = {row.target: row for row in rows}
    if padding.tp_degree > 1 and (unmapped := sorted(set(params) - set(by_path))):
        raise ConfigError(
            f"no row of the weight table says how {', '.join(unmapped)} is split; add one, or use tp_degree=1"
        )

    def read(path: str) -> np.ndarray:
        array, row = np.asarray(params[path]), by_path.get(path)
        if row is None:
            return array.astype(dtype, copy=False)
        return row.pad(array, padding).astype(row.dtype(dtype), copy=False)

    return Source(list(params), read, lambda path: by_path[path].partition if path in by_path else REPLICATED)


def first_not_finite(parameters: Mapping[str, Sequence[np.ndarray]]) -> str | None:
    """The name of the first parameter with a NaN or an infinity in any core's part; None where there is none."""
    return next(
        (name for name, parts in parameters.items() if not all(np.isfinite(part).all() for part in parts)), None
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(names[:most]) + more
