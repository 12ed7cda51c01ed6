"""From a checkpoint's tensors to a model's parameters: one row a weight, strict both ways."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import einops
import jax
import numpy as np
from einops import EinopsError
from einops.parsing import ParsedExpression
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.errors import CheckpointError, ConfigError
from jx_neuron.nn.sharding import AXIS, Padding
from jx_neuron.util.ondemand import OnDemand
from jx_neuron.util.pages import scratch
from jx_neuron.util.progress import ahead, track

REPLICATED = PartitionSpec()
LAYOUT = "legal are letters from HF's axes to ours, such as '(n h) d -> d n h'"

Params = dict[str, Array]
"""A model's parameters by dotted path, such as "h.0.attn.c_attn.kernel"."""


@dataclass(frozen=True)
class W:
    """One weight: where HF keeps it, where we do, how it is laid out, and how it is split among cores.

    `source` and `target` may hold {i}, the layer. `layout` is an einops pattern from HF's axes to ours, in the
    letters of the family's `Config.sizes`: "(n h) d -> d n h". `partition` names the axis of ours that is split, "tp".
    """

    source: str
    target: str
    layout: str
    partition: PartitionSpec = REPLICATED

    def __str__(self) -> str:
        return f"W({self.source!r}, {self.target!r}, {self.layout!r}, {self.partition})"

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises ConfigError that names this row unless layers, layout, letters and partition are legal."""
        for name in (self.source, self.target):
            if re.search("[{}]", name.replace("{i}", "")):
                raise self._refusal(f"{name!r} has braces; legal is {{i}} alone, which stands for the layer")
        if "{i}" in self.source and "{i}" not in self.target:
            raise self._refusal(f"the layer {{i}} of {self.source!r} is missing from {self.target!r}; write it in both")
        try:
            before, after = (ParsedExpression(side.strip()) for side in self.layout.split("->"))
        except (EinopsError, ValueError) as error:
            raise self._refusal(f"the layout {self.layout!r} is no einops pattern ({error}); {LAYOUT}") from error
        letters = [axis for group in after.composition for axis in group]
        axes_of_one = not all(before.composition + after.composition)  # "1" or "()", which no letter of sizes has
        if set(letters) != before.identifiers or letters != self.letters or after.has_ellipsis or axes_of_one:
            raise self._refusal(
                f"the layout {self.layout!r} should have the same letters before and after the arrow, no other axes, "
                f"and no parentheses after the arrow; {LAYOUT}"
            )
        if unknown := sorted(set(letters) - set(sizes)):
            raise self._refusal(
                f"Config.sizes has no letter {', '.join(map(repr, unknown))}; it has {', '.join(sorted(sizes))}. "
                "Write one of these, or add the letter to Config.sizes"
            )
        split = [axis for axis in self.partition if axis is not None]
        if not set(split) <= {AXIS} or len(split) > 1 or len(self.partition) > len(letters):
            raise self._refusal(
                f"the partition {self.partition} is not legal; each of the {len(letters)} axes {' '.join(letters)} is "
                f"None, or for one of them {AXIS!r}, the mesh's only axis: P({AXIS!r}) splits the first"
            )

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(f"row {self} of the weight table: {why}")

    @property
    def letters(self) -> list[str]:
        """The axes of ours."""
        return self.layout.split("->")[1].split()

    def at(self, layer: int) -> "W":
        return W(self.source.format(i=layer), self.target.format(i=layer), self.layout, self.partition)

    def source_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that HF's tensor must have."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.layout.split("->")[0])
        return tuple(math.prod(sizes[c] for c in (many or one).split()) for many, one in groups)

    def target_shape(self, padding: Padding) -> tuple[int, ...]:
        """The shape of ours, padded where it is split."""
        return tuple(
            padding.size(c) if split else padding.sizes[c] for c, split in zip(self.letters, self._split, strict=True)
        )

    def lay_out(self, tensor: np.ndarray, padding: Padding) -> np.ndarray:
        """HF's tensor as ours."""
        used = {c: s for c, s in padding.sizes.items() if c in self.layout.replace("(", " ").replace(")", " ").split()}
        return self.pad(einops.rearrange(tensor, self.layout, **used), padding)

    def pad(self, array: np.ndarray, padding: Padding) -> np.ndarray:
        """Our layout, padded where it is split."""
        for axis, (letter, split) in enumerate(zip(self.letters, self._split, strict=True)):
            if split:
                array = padding.apply(array, axis, letter)
        return array

    @property
    def _split(self) -> list[bool]:
        spec = tuple(self.partition)
        return [axis < len(spec) and spec[axis] == AXIS for axis in range(len(self.letters))]


@dataclass(frozen=True)
class Copy:
    """A tensor that a checkpoint may hold beside the one that it is tied to, and that must then equal it."""

    name: str
    of: str


class Tensors(Protocol):
    """What a checkpoint offers: named tensors, read one at a time."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


def flatten(module_or_state: Any) -> dict[str, Any]:
    """The parameters of an nnx module or state by dotted path, in order of path."""
    state = nnx.state(module_or_state, nnx.Param) if isinstance(module_or_state, nnx.Module) else module_or_state
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return dict(sorted(flat.items()))


def rows_of(table: Sequence[W], layers: int) -> Iterator[W]:
    """The rows of a weight table, one for each layer where they name it."""
    for row in table:
        yield from (row.at(i) for i in range(layers)) if "{i}" in row.target else (row,)


def present(table: Sequence[W], sizes: Mapping[str, int], layers: int, tensors: Tensors) -> dict[str, W]:
    """The rows whose tensors a checkpoint has, by target, their `source` as the checkpoint spells it.

    HF's base prefix ("transformer.", "model.") may be absent, as it is in checkpoints of the headless class.

    Raises CheckpointError where the checkpoint has fewer layers than `layers`, or tensors of another shape than `sizes`
    makes; so the sizes that a config claims are held against what is there before anything is built of them.
    """
    names = set(tensors.names())
    absent = tuple(p for p in _prefixes(table) if not any(name.startswith(p) for name in names))

    def spelled(row: W) -> W:
        prefix = next((p for p in absent if row.source.startswith(p)), "")
        return W(row.source.removeprefix(prefix), row.target, row.layout, row.partition)

    rows = [spelled(row) for row in table]
    of_layers = [row for row in rows if "{i}" in row.target]
    deep = next(i for i in count() if not any(row.at(i).source in names for row in of_layers))
    if 0 < deep < layers:
        raise CheckpointError(f"the config calls for {layers} layers and the checkpoint has {deep}; {_OTHERS}")
    found = {row.target: row for row in rows_of(rows, layers) if row.source in names}
    for row in found.values():
        expected, actual = row.source_shape(sizes), tuple(tensors.shape(row.source))
        if actual != expected:
            raise CheckpointError(
                f"tensor {row.source} has shape {list(actual)} and the config calls for {list(expected)}, by the "
                f"layout {row.layout!r}; {_OTHERS}, or the layout is wrong"
            )
    return found


def match(
    table: Sequence[W],
    ignore: Sequence[str | Copy],
    shapes: Mapping[str, tuple[int, ...]],
    layers: int,
    padding: Padding,
    tensors: Tensors,
) -> list[W]:
    """The row of each parameter, its `source` as the checkpoint spells it, in order of the checkpoint's names.

    Raises CheckpointError that names each parameter without a tensor, tensor without a parameter (unless a regular
    expression of `ignore` matches it, or it is the copy that a `Copy` there says), and what `present` does.
    """
    rows = {row.target: row for row in rows_of(table, layers) if row.target in shapes}
    found = {target: row for target, row in present(table, padding.sizes, layers, tensors).items() if target in rows}
    if missing := [row.source for target, row in rows.items() if target not in found]:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}, which the config calls for")
    used = {row.source for row in found.values()}
    rest = set(tensors.names()) - used
    for copy in (entry for entry in ignore if isinstance(entry, Copy) and entry.name in rest):
        _check_copy(copy, next(name for name in used if copy.of.endswith(name)), tensors)
        rest.remove(copy.name)
    base = "|".join(map(re.escape, _prefixes(table)))
    ignored = [re.compile(rf"(?:{base})?(?:{pattern})") for pattern in ignore if isinstance(pattern, str)]
    if extra := [name for name in sorted(rest) if not any(p.fullmatch(name) for p in ignored)]:
        raise CheckpointError(
            f"the checkpoint holds {_some(extra)}, which no parameter takes; {_unclaimed(extra[0], table, layers)}"
        )
    return sorted(found.values(), key=lambda row: row.source)


_OTHERS = "config.json and weights are not of the same model"


def _prefixes(table: Sequence[W]) -> set[str]:
    return {row.source.split(".")[0] + "." for row in table if row.source.count(".") > 1}


def _unclaimed(name: str, table: Sequence[W], layers: int) -> str:
    """Why no parameter takes the tensor `name`, and what to do."""
    row = next((row for row in rows_of(table, layers) if row.source == name or row.source.endswith("." + name)), None)
    if row is None:
        return (
            "config.json and weights are not of the same model, or the decoder forgets it: it needs a parameter in "
            "Model and a row in WEIGHTS, or a pattern in IGNORE"
        )
    return (
        f"row {row} names it, but Model has no parameter {row.target!r} with this config: config.json leaves it out, "
        "or Model does (a Linear with bias=False has no bias, a tied head no table of its own)"
    )


def _check_copy(copy: Copy, source: str, tensors: Tensors) -> None:
    if not np.array_equal(tensors.read(copy.name), tensors.read(source)):
        raise CheckpointError(
            f"the checkpoint's {copy.name} differs from {source}, and the config ties the two; "
            "set tie_word_embeddings to false in config.json if they are meant to differ"
        )


Join = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Makes one array of several."""


def joint(paths: Sequence[str]) -> str:
    """The name of parameters that are placed as one array."""
    return " ".join(paths)


@dataclass(frozen=True)
class Source:
    """Where a model's parameters come from, one at a time: laid out, padded and cast, on the host.

    paths: the parameters, in the order in which they are best read.
    read:  gives one whole, in whatever order of memory is at hand.
    split: gives its partition.
    name:  gives its name in the checkpoint.
    """

    paths: Sequence[str]
    read: Callable[[str], np.ndarray]
    split: Callable[[str], PartitionSpec]
    name: Callable[[str], str] = str

    def place(
        self,
        mesh: Mesh,
        joined: Mapping[tuple[str, ...], Join] | None = None,
        put: Callable[[str, np.ndarray], np.ndarray] | None = None,
    ) -> Params:
        """All parameters on the devices of `mesh`; the host holds a few of them beside the model.

        Those of a key of `joined`, which are whole on every device, are placed as the one array that its function makes
        of them, under the name that `joint` gives them. `put` copies an array of that name to where a device is to take
        it; two threads call it.
        """
        joins = joined or {}
        of = {path: paths for paths in joins for path in paths}
        wanted = list(dict.fromkeys(of.get(path, (path,)) for path in self.paths))

        def read(paths: tuple[str, ...]) -> np.ndarray:
            with scratch() if put else nullcontext():
                arrays = [self.read(path) for path in paths]
                array = joins[paths](arrays) if paths in joins else arrays[0]
                return put(joint(paths), array) if put else np.ascontiguousarray(array)

        placed: Params = {}
        arrays = zip(track(wanted, "loading weights", len(wanted)), ahead(read, wanted), strict=True)
        for paths, array in arrays:
            sharding = NamedSharding(mesh, REPLICATED if paths in joins else self.split(paths[0]))
            placed[joint(paths)] = jax.device_put(array, sharding).block_until_ready()
        return dict(sorted(placed.items()))

    def parts(self, tp_degree: int) -> Mapping[str, list[np.ndarray]]:
        """Each core's part of each parameter, by path; a parameter is read when it is asked for, once for all cores."""

        def read(path: str) -> list[np.ndarray]:
            whole = self.read(path)
            axis = next((axis for axis, name in enumerate(self.split(path)) if name), None)
            if axis is None:
                return [np.asarray(whole, order="C")] * tp_degree
            return [np.asarray(part, order="C") for part in np.split(whole, tp_degree, axis)]

        return OnDemand(sorted(self.paths), read)


def from_checkpoint(rows: Sequence[W], padding: Padding, tensors: Tensors, dtype: np.dtype[Any]) -> Source:
    """The tensors of a checkpoint, by the rows that `match` found."""
    by_path = {row.target: row for row in rows}

    def read(path: str) -> np.ndarray:
        row = by_path[path]
        return row.lay_out(tensors.read(row.source), padding).astype(dtype, copy=False)

    return Source(list(by_path), read, lambda path: by_path[path].partition, lambda path: by_path[path].source)


def from_params(params: Mapping[str, Any], rows: Sequence[W], padding: Padding, dtype: np.dtype[Any]) -> Source:
    """Parameters in hand, unpadded. One without a row is whole on every core.

    Raises ConfigError where cores share the model and a parameter has no row.
    """
    by_path = {row.target: row for row in rows}
    if padding.tp_degree > 1 and (unmapped := sorted(set(params) - set(by_path))):
        raise ConfigError(
            f"no row of the weight table says how {', '.join(unmapped)} is split; add one, or use tp_degree=1"
        )

    def read(path: str) -> np.ndarray:
        array = np.asarray(params[path])
        return (by_path[path].pad(array, padding) if path in by_path else array).astype(dtype, copy=False)

    return Source(list(params), read, lambda path: by_path[path].partition if path in by_path else REPLICATED)


def first_not_finite(parameters: Mapping[str, Sequence[np.ndarray]]) -> str | None:
    """The name of the first parameter of which a core's part holds a NaN or an infinity, None where none does."""
    return next(
        (name for name, parts in parameters.items() if not all(np.isfinite(part).all() for part in parts)), None
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(names[:most]) + more
