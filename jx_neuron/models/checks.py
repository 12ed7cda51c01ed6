"""Checks that the parts of a decoder fit together. Each error names the part or the row, and what is legal."""

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from flax import nnx

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.weights import Copy, W, rows_of
from jx_neuron.errors import ConfigError
from jx_neuron.nn.layout import Kept, S
from jx_neuron.nn.sharding import Padding
from jx_neuron.util.arguments import integer

PARTS = ("Config", "Model", "WEIGHTS", "IGNORE")
METHODS = {"__call__": 3, "logits": 1}  # methods of Model and their numbers of arguments: DecoderModule
LETTERS, OF_ATTENTION = "dv", "dnkhv"  # axes that padding and plans need, and those of a model with keys and values


def parts(model_type: str, family: Any) -> None:
    """Raises ConfigError unless `family` has every part of a decoder, each of the right type."""
    decoder = f"the decoder registered as {model_type!r}"
    if absent := [name for name in PARTS if not hasattr(family, name)]:
        raise ConfigError(f"{decoder} lacks {', '.join(absent)}{_misspelt(absent, dir(family))}")
    config, model = family.Config, family.Model
    is_config = inspect.isclass(config) and issubclass(config, HFConfig) and dataclasses.is_dataclass(config)
    if not is_config:
        raise ConfigError(f"{decoder}: Config should be a dataclass: @dataclass(frozen=True) class Config(HFConfig)")
    if not getattr(config, "MODEL_TYPE", ""):
        raise ConfigError(f"{decoder}: Config should say MODEL_TYPE = {model_type!r}")
    for field in dataclasses.fields(config):
        if isinstance(field.default, property):
            raise ConfigError(f"{decoder}: the field {field.name!r} of Config needs a default, as HF's config has one")
    if not (inspect.isclass(model) and issubclass(model, nnx.Module)):
        raise ConfigError(f"{decoder}: Model should be a class: class Model(nnx.Module)")
    for name, count in METHODS.items():
        method = next((vars(base)[name] for base in model.__mro__ if name in vars(base)), None)
        if method is None:
            raise ConfigError(
                f"{decoder}: Model has no method {name}; it needs __call__(self, tokens_bt, state, at), which returns "
                f"hidden states and state, and logits(self, x_btd){_misspelt([name], dir(model))}"
            )
        try:
            inspect.signature(method).bind(*range(1 + count))
        except TypeError as error:
            raise ConfigError(
                f"{decoder}: Model.{name} should take {count} arguments after self, as do "
                f"__call__(self, tokens_bt, state, at) and logits(self, x_btd): {error}"
            ) from error
    if isinstance(family.WEIGHTS, str) or not all(isinstance(row, W) for row in family.WEIGHTS):
        raise ConfigError(f"{decoder}: WEIGHTS should be a sequence of W, a row for each weight")
    if isinstance(family.IGNORE, str) or not all(isinstance(entry, str | Copy) for entry in family.IGNORE):
        raise ConfigError(
            f"{decoder}: IGNORE should be a sequence of regular expressions and Copy; one in parentheses needs a comma "
            "after it"
        )
    for pattern in family.IGNORE:
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            raise ConfigError(f"{decoder}: {pattern!r} in IGNORE is no regular expression ({error})") from error


def sizes(config: HFConfig, state: Sequence[S]) -> None:
    """Raises ConfigError unless every size is 1 or more, every letter that a model of these rows of STATE needs has
    one, and what `config` says of each layer it says of all."""
    sizes, attends = config.sizes, any("k" in row.letters for row in state)
    if absent := [letter for letter in (OF_ATTENTION if attends else LETTERS) if letter not in sizes]:
        needed = "n (query heads), k (key/value heads), h (head size) " if attends else ""
        raise ConfigError(
            f"{config.MODEL_TYPE}: Config.sizes lacks {', '.join(absent)}; it needs d (model width), {needed}"
            "and v (vocabulary)"
        )
    for letter, size in sizes.items():
        integer(f"{config.MODEL_TYPE}: Config.sizes[{letter!r}]", size, error=ConfigError)
    for name in ("types", "windows", "own_state"):
        if len(values := getattr(config, name)) != config.layers:
            raise ConfigError(
                f"{config.MODEL_TYPE}: Config.{name} has {len(values)} entries for {config.layers} layers"
            )
    for layer in range(config.layers):
        own = config.sizes_of(layer)
        if own.keys() != sizes.keys():
            raise ConfigError(f"{config.MODEL_TYPE}: Config.sizes_of({layer}) has other letters than Config.sizes")
        for letter, size in own.items():
            integer(f"{config.MODEL_TYPE}: Config.sizes_of({layer})[{letter!r}]", size, error=ConfigError)


def state(rows: Sequence[S], config: HFConfig) -> None:
    """Raises ConfigError unless rows of STATE have letters of `Config.sizes`, and names that differ within a layer."""
    for row in rows:
        if unknown := sorted({*row.letters} - {"s", *config.sizes}):
            raise ConfigError(
                f"{config.MODEL_TYPE}: {row} of STATE has the letter {', '.join(map(repr, unknown))}; legal are s, for "
                f"positions, and those of Config.sizes, {', '.join(sorted(config.sizes))}"
            )
    for kind in dict.fromkeys(config.types):
        counts = Counter(row.name for row in rows if row.of in (None, kind))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ConfigError(f"{config.MODEL_TYPE}: STATE has several rows {twice[0]!r} for layers of type {kind!r}")


def shared(layers: Sequence[Kept], config: HFConfig) -> None:
    """Raises ConfigError where a layer without a state of its own has none to read."""
    for i, layer in enumerate(layers):
        if not layer.own and replace(layer, own=True) not in layers[:i]:
            raise ConfigError(
                f"{config.MODEL_TYPE}: layer {i} has no state of its own, by Config.own_state, and no layer before it "
                "that has one keeps the same rows of STATE, of the same sizes and window"
            )


def table(rows: Sequence[W], config: HFConfig, shapes: Mapping[str, Sequence[int]], *, complete: bool) -> None:
    """Raises ConfigError unless the rows of a weight table fit the sizes of `config` and the parameters of the model.

    shapes:   the unpadded shape of each parameter, by path.
    complete: whether every parameter needs a row, as for a checkpoint.
    """
    every = {tuple(sizes.items()): sizes for sizes in (config.sizes, *map(config.sizes_of, range(config.layers)))}
    for row in rows:
        for sizes in every.values():
            row.check(sizes)
    expanded = list(rows_of(rows, config.layers))
    counts = Counter(row.target for row in expanded)
    _alternatives(expanded)
    for row in expanded:
        sizes = row.sizes(config)
        axes = tuple(sizes[letter] for letter in row.letters)
        if row.target in shapes and axes != tuple(shapes[row.target]):
            raise ConfigError(
                f"row {row}: the layout ends in {' '.join(row.letters)}, so {list(axes)}, and the parameter has shape "
                f"{list(shapes[row.target])}; mend the layout, Model or Config.sizes"
            )
    filled = [row for row in expanded if row.target in shapes]
    for row in filled:
        if row.is_computed:
            row.compute(config)
    if complete and (unfilled := _by_layer(path for path in shapes if path not in counts)):
        raise ConfigError(
            f"no row of the weight table fills {', '.join(unfilled)}{_misspelt_row(unfilled, rows, shapes)}; "
            "every parameter of Model needs a row W(HF's name, ours, layout, partition)"
        )
    if complete:
        _parts(filled)
    if config.LAYERS_ALIKE:
        _alike(rows, config, shapes)


def _alike(rows: Sequence[W], config: HFConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ConfigError unless all layers have the same shapes, and a field has the number of layers."""
    config.with_layers(1)
    for row in (row for row in rows if "{i}" in row.target):
        if len({tuple(shapes.get(row.at(layer).target, ())) for layer in range(config.layers)}) > 1:
            raise ConfigError(
                f"{config.MODEL_TYPE}: Config says LAYERS_ALIKE, and {row.target!r} is not alike in all layers; "
                "set LAYERS_ALIKE = False"
            )


def _alternatives(rows: Sequence[W]) -> None:
    """Raises ConfigError unless rows that fill one parameter read other tensors, and give the same axes."""
    first: dict[str, W] = {}
    for row in rows:
        other = first.setdefault(row.target, row)
        if other is row:
            continue
        names = {other.name, row.name}
        alike = (other.letters, other.partition, other.is_float32) == (row.letters, row.partition, row.is_float32)
        if row.is_computed or len(names) < 2 or not alike:
            raise ConfigError(
                f"row {row}: 2 rows fill {row.target!r}; keep one of them, or have each read tensors that only some "
                "checkpoints have, into the same axes and partition"
            )


def _parts(rows: Sequence[W]) -> None:
    """Raises ConfigError unless the rows that select parts of one tensor select each part once."""
    by_name: dict[str, list[W]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, sharing in by_name.items():
        row = max(sharing, key=lambda row: len(row.parts))
        if not row.parts:
            continue
        if other := next((other for other in sharing if (other.axes, other.parts) != (row.axes, row.parts)), None):
            raise ConfigError(f"rows {row} and {other} lay the axes of {name!r} out differently; write them alike")
        counts = Counter(other.part for other in sharing)
        if wrong := [i for i in range(len(row.parts)) if counts[i] != 1]:
            listed = ", ".join(f"part {i + 1} ({row.parts[i]}) {counts[i]} times" for i in wrong)
            raise ConfigError(
                f"row {row} takes a part of {name!r}, and the rows that fill parameters of Model take {listed}; every "
                "part should be taken once"
            )


def splits(rows: Sequence[W], padding: Padding) -> None:
    """Raises ConfigError where an axis that is padded is split in one row and not in another.

    Arrays of the two rows would have different sizes of one axis. Arrays of the vocabulary are never combined, so that
    axis is exempt.
    """
    for each in padding.distinct:
        first: dict[str, tuple[int, W]] = {}
        for row in rows:
            for letter, size in zip(row.letters, row.target_shape(each), strict=True):
                if letter != "v" and first.setdefault(letter, (size, row))[0] != size:
                    (whole, unsplit_row), (padded, split_row) = sorted(
                        (first[letter], (size, row)), key=lambda entry: entry[0]
                    )
                    raise ConfigError(
                        f"row {unsplit_row} leaves the axis {letter!r} whole, and row {split_row} splits it: at "
                        f"tp_degree={padding.tp_degree} it has {whole} entries in the one and {padded} in the other. "
                        "Split it in both"
                    )


def unused(rows: Sequence[W], paths: Iterable[str]) -> list[W]:
    """The rows that fill none of the parameters `paths`."""
    targets = set(paths) | set(_by_layer(paths))
    return [row for row in rows if row.target not in targets]


def _misspelt_row(unfilled: Sequence[str], rows: Sequence[W], paths: Iterable[str]) -> str:
    """The first unused row whose target is close to a parameter that no row fills."""
    for row in unused(rows, paths):
        if close := get_close_matches(row.target, unfilled, 1):
            return f". Row {row} fills {row.target!r}, which Model has not: did you mean {close[0]!r}?"
    return ""


def _misspelt(absent: Sequence[str], names: Sequence[str]) -> str:
    """Suggests the first of `absent` for a name that is close to it."""
    for name in absent:
        if close := get_close_matches(name, [other for other in names if not other.startswith("_")], 1):
            return f"; did you mean {name} by {close[0]}?"
    return ""


def _by_layer(paths: Iterable[str]) -> list[str]:
    """Paths of parameters, {i} for the number of their layer."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".{i}.", path, count=1) for path in paths))
