"""A row of a weight table: one parameter of a model, and where it comes from."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from einops import EinopsError
from jax.sharding import PartitionSpec

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.layout import Layout, axes_of, parse, restored
from jx_neuron.errors import ConfigError
from jx_neuron.nn.adapters import COUNT, PARTS, RANK, part_of
from jx_neuron.nn.sharding import AXIS, Padding

REPLICATED = PartitionSpec()
LAYOUT = "legal are letters from HF's axes to ours, such as '(n h) d -> d n h'"


class Tensors(Protocol):
    """The tensors of a checkpoint by name, read one at a time."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


def slices(tensors: Tensors, name: str) -> Iterator[np.ndarray]:
    """A tensor in parts along its first axis, where `tensors` has a method of this name; else whole."""
    read: Callable[[str], Iterator[np.ndarray]] = getattr(tensors, "slices", lambda name: iter([tensors.read(name)]))
    return read(name)


def affine(tensors: Tensors, name: str, grouped: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """The scale and the offset of each number of a tensor, where `tensors` has a method of this name; else None."""
    read: Callable[..., tuple[np.ndarray, np.ndarray] | None] = getattr(tensors, "affine", lambda name, grouped: None)
    return read(name, grouped)


def part(tensors: Tensors, name: str, axis: int, index_n: np.ndarray) -> np.ndarray:
    """The entries `index_n`, ascending, of an axis of a tensor; the rest is not held where `tensors` has a method of
    this name."""
    read: Callable[..., np.ndarray] | None = getattr(tensors, "part", None)
    return np.take(tensors.read(name), index_n, axis) if read is None else read(name, axis, index_n)


@dataclass(frozen=True)
class W:
    """A row of a weight table: HF's tensor, our parameter, the layout, and the axis that is split over the cores.

    source:    the name of HF's tensor, or a function of the config that computes the parameter. {i} is the layer. {e}
               stacks the tensors of all experts along an axis e, before those of the tensor, and {n} or {k} those of
               all heads.
    target:    the path of the parameter, also with {i}.
    layout:    an einops pattern from HF's axes to ours, in the letters of `Config.sizes`: "(n h) d -> d n h". In a sum,
               brackets take a part of a fused axis: "(n h + [k h] + k h) d -> d k h". A quotient n/k before the arrow
               is the heads of each of k groups: "(k n/k h) d -> d n h".
    partition: names the axis of the parameter that is split, "tp".
    exact:     the parameter is float32 in a model of 16 bits too, which would round it too much.
    layer:     the layer that gives the letters their sizes, set by `at`; None is the model.
    """

    source: str | Callable[[Any], np.ndarray]
    target: str
    layout: str
    partition: PartitionSpec = REPLICATED
    exact: bool = False
    layer: int | None = None

    def __str__(self) -> str:
        source = repr(self.source) if isinstance(self.source, str) else getattr(self.source, "__name__", "a function")
        return f"W({source}, {self.target!r}, {self.layout!r}, {self.partition})"

    @property
    def is_computed(self) -> bool:
        """Whether a function fills the parameter, and no tensor."""
        return not isinstance(self.source, str)

    @property
    def is_float32(self) -> bool:
        """Whether the parameter is float32 in any model, as what is computed is."""
        return self.exact or self.is_computed

    def dtype(self, dtype: Any) -> np.dtype[Any]:
        """That of the parameter in a model of `dtype`."""
        return np.dtype(np.float32 if self.is_float32 else dtype)

    @property
    def name(self) -> str:
        """HF's name, {e} for any expert; ours where the parameter is computed."""
        return self.source if isinstance(self.source, str) else self.target

    @property
    def stacked(self) -> str:
        """The letter of the axis along which tensors are stacked; "" where one tensor is read."""
        return next(iter(re.findall(r"\{([ekn])\}", self.name)), "")

    def of(self, index: int | str) -> str:
        """HF's name of one of the stacked tensors."""
        return self.name.replace(f"{{{self.stacked}}}", str(index))

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises ConfigError that names this row unless layers, layout, letters and partition are legal."""
        for name, legal in ((self.name, ("{i}", f"{{{self.stacked}}}")), (self.target, ("{i}",))):
            if re.search("[{}]", re.sub("|".join(map(re.escape, legal)), "", name)):
                raise self._refusal(
                    f"{name!r} has braces; legal are {{i}}, which stands for the layer, and in HF's name {{e}}, for "
                    "each expert, or {{n}} or {{k}}, for each head"
                )
        if "{i}" in self.name and "{i}" not in self.target:
            raise self._refusal(f"the layer {{i}} of {self.name!r} is missing from {self.target!r}; write it in both")
        try:
            self._layout.check()
        except (EinopsError, ValueError) as error:
            letter = self.stacked
            stacked = f"; {{{letter}}} puts an axis {letter} before those of the tensor" if letter else ""
            raise self._refusal(
                f"the layout {self.layout!r} is no einops pattern of that form ({error}){stacked}; {LAYOUT}"
            ) from error
        if unknown := sorted(self._layout.letters - set(sizes)):
            raise self._refusal(
                f"Config.sizes has no letter {', '.join(map(repr, unknown))}; it has {', '.join(sorted(sizes))}. "
                "Write one of these, or add the letter to Config.sizes"
            )
        for a, b in self._layout.quotients:
            if sizes[a] % sizes[b]:
                raise self._refusal(f"{a}={sizes[a]} is not divisible by {b}={sizes[b]}, and the layout has {a}/{b}")
        letters = self.letters
        split = [axis for axis in self.partition if axis is not None]
        if not set(split) <= {AXIS} or len(split) > 1 or len(self.partition) > len(letters):
            raise self._refusal(
                f"the partition {self.partition} is not legal; each of the {len(letters)} axes {' '.join(letters)} is "
                f"None, or for one of them {AXIS!r}, the mesh's only axis: P({AXIS!r}) splits the first"
            )

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(f"row {self} of the weight table: {why}")

    @property
    def _layout(self) -> Layout:
        return parse(f"{self.stacked} {self.layout}" if self.stacked else self.layout)

    @property
    def letters(self) -> list[str]:
        """The axes of ours."""
        return self.layout.split("->")[1].split()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the fused axis of HF's tensor, as the layout writes them; none where no axis is fused."""
        return self._layout.parts

    @property
    def part(self) -> int:
        """Which of `parts` this row takes."""
        return self._layout.part

    @property
    def axes(self) -> str:
        """HF's axes, whichever part is taken of them."""
        return self._layout.before

    @property
    def last(self) -> list[str]:
        """The letters of the last axis of HF's tensor."""
        return self._layout.groups[-1]

    @property
    def has_inputs_first(self) -> bool:
        """Whether HF's matrix is [inputs, outputs], as of transformers' Conv1D, and not [outputs, inputs]."""
        lead = len(self.stacked)
        first = self._layout.groups[lead]
        return self.target.endswith(".kernel") and self.letters[lead : lead + len(first)] == first

    def at(self, layer: int) -> "W":
        source = self.source.replace("{i}", str(layer)) if isinstance(self.source, str) else self.source
        return replace(self, source=source, target=self.target.replace("{i}", str(layer)), layer=layer)

    def sizes(self, config: HFConfig) -> dict[str, int]:
        """The sizes of its letters, in its layer or in the model."""
        return config.sizes if self.layer is None else config.sizes_of(self.layer)

    def names(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """The tensors that are read: one, one an expert or head, or none."""
        if self.stacked:
            yield from map(self.of, range(sizes[self.stacked]))
        elif not self.is_computed:
            yield self.name

    def source_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that HF's tensor must have, or what is computed."""
        return self._layout.shape(sizes)[len(self.stacked) :]

    def target_shape(self, padding: Padding) -> tuple[int, ...]:
        """The shape of ours, padded where it is split."""
        padding = padding.of(self.layer)
        return tuple(
            padding.size(c) if split else padding.sizes[c] for c, split in zip(self.letters, self._split, strict=True)
        )

    def compute(self, config: HFConfig) -> np.ndarray:
        """The result of the function for `config`. Raises ConfigError that names this row if its shape differs."""
        array = np.asarray(cast(Callable[[HFConfig], np.ndarray], self.source)(config))
        if array.shape != (expected := self.source_shape(self.sizes(config))):
            raise self._refusal(f"the function gives shape {list(array.shape)}, and the layout says {list(expected)}")
        return array

    def read(self, config: HFConfig, tensors: Tensors) -> np.ndarray:
        """The parameter, unpadded: computed, or laid out of HF's tensors."""
        sizes = self.sizes(config)
        return self.laid_out(
            [self.compute(config)] if self.is_computed else [*map(tensors.read, self.names(sizes))], sizes
        )

    def affine(self, config: HFConfig, tensors: Tensors, grouped: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """The scale and the offset of each number, as `read` lays these out; None where a tensor does not have them, or
        not as `grouped` says (Checkpoint.affine)."""
        sizes = self.sizes(config)
        pairs = [affine(tensors, name, grouped) for name in self.names(sizes)]
        if not pairs or any(pair is None for pair in pairs):
            return None
        scales, offsets = zip(*pairs, strict=True)
        return self.laid_out(scales, sizes), self.laid_out(offsets, sizes)

    def laid_out(self, arrays: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """Our layout of HF's tensors, one or several that are stacked."""
        return self._layout.apply(np.stack(arrays) if self.stacked else arrays[0], sizes)

    def slices(self, config: HFConfig, tensors: Tensors) -> Iterator[np.ndarray]:
        """The parameter, unpadded, in parts along its first axis, where its tensor can be read so and is as it is."""
        if self.is_computed or self.stacked or not self._layout.changes_nothing:
            yield self.read(config, tensors)
        else:
            yield from slices(tensors, self.name)

    def pad(self, array: np.ndarray, padding: Padding) -> np.ndarray:
        """Our layout, padded where it is split."""
        for axis, (letter, split) in enumerate(zip(self.letters, self._split, strict=True)):
            if split:
                array = padding.of(self.layer).apply(array, axis, letter)
        return array

    def low_rank(self) -> tuple["W", "W"] | None:
        """The rows of A and B of adapters, [i, r, inputs] and [i, outputs, r] in HF's layout; None where the parameter
        is no matrix of one tensor that has its inputs before or behind its outputs."""
        written, groups = axes_of(self.layout.split("->")[0]), self._layout.groups
        if self.stacked or self.is_computed or len(written) != 2:
            return None
        at = 0 if self.has_inputs_first else 1
        inputs, ours = groups[at], self.letters
        outputs = [letter for letter in ours if letter not in inputs]
        if ours not in (inputs + outputs, outputs + inputs):
            return None
        split = dict(zip(ours, (*self.partition, *[None] * len(ours)), strict=False))
        layouts = (
            f"{COUNT} {RANK} {written[at]} -> {COUNT} {' '.join(inputs)} {RANK}",
            f"{COUNT} {written[1 - at]} {RANK} -> {COUNT} {RANK} {' '.join(outputs)}",
        )
        specs = (
            PartitionSpec(None, *(split[letter] for letter in inputs), None),
            PartitionSpec(None, None, *(split[letter] for letter in outputs)),
        )
        a, b = (
            W(self.source, part_of(self.target, part), layout, spec, self.exact, self.layer)
            for part, layout, spec in zip(PARTS, layouts, specs, strict=True)
        )
        return a, b

    def core(self, config: HFConfig, tensors: Tensors, padding: Padding, core: int) -> np.ndarray:
        """The part of one core, padded: `pad` of `read`, divided; of HF's tensors no more is held than it takes, where
        these can be read in part."""
        if self.is_computed or True not in self._split:
            whole = self.pad(self.read(config, tensors), padding)
            return self._of_core(whole, padding, core) if True in self._split else whole
        sizes, axis = self.sizes(config), self._split.index(True)
        letter, padding = self.letters[axis], padding.of(self.layer)
        names = list(self.names(sizes))
        arrays: list[Any]
        if letter == self.stacked:
            entry_n = self._of_core(padding.apply(np.arange(1, len(names) + 1), 0, letter), padding, core, 0)
            shape = self.source_shape(sizes)
            arrays = [tensors.read(names[entry - 1]) if entry else None for entry in entry_n.tolist()]
            dtype = next((array.dtype for array in arrays if array is not None), np.dtype(np.float32))
            stack = np.stack([np.zeros(shape, dtype) if array is None else array for array in arrays])
            return self._layout.apply(stack, {**sizes, letter: len(arrays)})
        before, after = self.layout.split("->")
        layout = parse(f"{before}->{' '.join(one for one in after.split() if one != self.stacked)}")
        if (places := layout.places(letter, sizes)) is None:
            return self._of_core(self.pad(self.read(config, tensors), padding), padding, core)
        own = list(places.letters).index(letter)
        number = self._of_core(padding.apply(places.number, own, letter), padding, core, own)
        index_n, places = np.unique(number[number > 0]) - 1, replace(places, number=number)
        arrays = [layout.placed(part(tensors, name, places.axis, index_n), places, index_n, sizes) for name in names]
        return np.stack(arrays, self.letters.index(self.stacked)) if self.stacked else arrays[0]

    def _of_core(self, whole: np.ndarray, padding: Padding, core: int, axis: int | None = None) -> np.ndarray:
        axis = self._split.index(True) if axis is None else axis
        return np.split(whole, padding.tp_degree, axis)[core]

    @property
    def _split(self) -> list[bool]:
        spec = tuple(self.partition)
        return [axis < len(spec) and spec[axis] == AXIS for axis in range(len(self.letters))]


def tensors_of(rows: Sequence[W], parameters: Sequence[np.ndarray], config: HFConfig) -> dict[str, np.ndarray]:
    """HF's tensors that `rows`, all rows of one name, read unpadded `parameters` from: the inverse of `W.read`."""
    row = rows[0]
    sizes = row.sizes(config)
    array = restored([each._layout for each in rows], parameters, sizes)
    return dict(zip(row.names(sizes), array if row.stacked else [array], strict=True))
