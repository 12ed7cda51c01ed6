"""The inputs and outputs of a program: pytrees of arrays and PartitionSpecs, flattened, with a name for each leaf."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jx_neuron.errors import LoweringError
from jx_neuron.lowering.signature import Kind, TensorSpec


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, PartitionSpec)


def spread(what: str, specs: Any, tree: Any, mesh: Mapping[str, int]) -> Any:
    """Broadcasts a pytree prefix of PartitionSpecs (or None) to the axes of every leaf. Raises LoweringError where one
    does not fit."""

    def one(spec: PartitionSpec | None, below: Any) -> Any:
        return jax.tree.map(lambda leaf: _Axes(_axes(what, spec, leaf.shape, mesh)), below)

    try:
        return jax.tree.map(one, specs, tree, is_leaf=_is_spec)
    except (ValueError, TypeError) as error:
        if isinstance(error, LoweringError):
            raise
        raise LoweringError(f"{what} is no prefix of the pytree that it describes: {error}") from error


@dataclass(frozen=True)
class _Axes:
    names: tuple[str | None, ...]


def _axes(
    what: str, spec: PartitionSpec | None, shape: tuple[int, ...], mesh: Mapping[str, int]
) -> tuple[str | None, ...]:
    names = [entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry for entry in spec or ()]
    split = [name for name in names if name is not None]
    if len(names) > len(shape) or not set(split) <= set(mesh) or len(set(split)) < len(split):
        raise LoweringError(
            f"{what}: {spec} does not fit an array of shape {shape}: name the axis {', '.join(map(repr, mesh))} at "
            f"most once, and at most {len(shape)} axes"
        )
    return (*names, *[None] * (len(shape) - len(names)))


def shardings(mesh: AbstractMesh, tree: Any) -> Any:
    """The axes that `spread` returns, as shardings over a mesh."""
    return jax.tree.map(lambda axes: NamedSharding(mesh, PartitionSpec(*axes.names)), tree)


def _key(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="."))


def input_labels(
    fn: Callable[..., Any], args: tuple[Any, ...], kinds: Sequence[Kind], names: Sequence[str] | None
) -> Iterator[tuple[str, Kind]]:
    """The name and kind of every array of the arguments, as `lower` documents them."""
    if len(kinds) != len(args):
        raise LoweringError(f"{len(kinds)} input_kinds given for {len(args)} arguments")
    labels = [
        (key if kind == "param" and key else f"{argument}.{key}" if key else argument, kind)
        for argument, kind, tree in zip(_argument_names(fn, args), kinds, args, strict=True)
        for key in (_key(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    ]
    if names is None:
        return iter(labels)
    if len(names) != len(labels):
        raise LoweringError(f"{len(names)} input_names given for {len(labels)} arrays")
    return zip(names, [kind for _, kind in labels], strict=True)


def _argument_names(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    try:
        bound = inspect.signature(fn).bind(*args)
    except TypeError as error:
        raise LoweringError(f"the function does not take {len(args)} arguments: {error}") from error
    names: list[str] = []
    for name, value in bound.arguments.items():
        variadic = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}{n}" for n in range(len(value))] if variadic else [name]
    return names


def output_labels(outputs: Any) -> Iterator[tuple[str, Kind]]:
    """The name and kind of every array of a result: output, then its path."""
    for path, _ in jax.tree_util.tree_leaves_with_path(outputs):
        key = _key(path)
        yield (f"output.{key}" if key else "output"), "output"


def tensor_specs(tree: Any, axes: Any, mesh: Mapping[str, int], labels: Iterator[tuple[str, Kind]]) -> list[TensorSpec]:
    """A spec of each array of a pytree on one core of `mesh`. Raises LoweringError where an axis does not divide."""
    specs = []
    for leaf, split, (name, kind) in zip(jax.tree.leaves(tree), jax.tree.leaves(axes), labels, strict=True):
        cores = [mesh[axis] if axis else 1 for axis in split.names]
        if uneven := [count for size, count in zip(leaf.shape, cores, strict=True) if size % count]:
            raise LoweringError(
                f"{name} of shape {leaf.shape} cannot be split as {split.names} over {uneven[0]} cores: pad that axis "
                f"to a multiple of {uneven[0]}"
            )
        shape = tuple(size // count for size, count in zip(leaf.shape, cores, strict=True))
        specs.append(TensorSpec(name, kind, shape, np.dtype(leaf.dtype).name, split.names))
    return specs


def alias_donated(inputs: list[TensorSpec], donated: list[int], outputs: list[TensorSpec]) -> list[TensorSpec]:
    """The outputs. One that aliases a donated input has its name and number.

    Raises LoweringError where no run of outputs matches the donated inputs.
    """
    donated_placements = [_placement(inputs[n]) for n in donated]
    for start in range(len(outputs) - len(donated), -1, -1):
        candidates = outputs[start : start + len(donated)]
        if [_placement(spec) for spec in candidates] == donated_placements:
            return [
                *outputs[:start],
                *(replace(inputs[n], alias=n) for n in donated),
                *outputs[start + len(donated) :],
            ]
    raise LoweringError(
        f"no outputs take the memory of {', '.join(inputs[n].name for n in donated)}: return them one after the other, "
        "in this order, with the same shape, dtype and PartitionSpec (out_specs), or do not donate them"
    )


def _placement(spec: TensorSpec) -> tuple[Any, ...]:
    return spec.shape, spec.dtype, spec.partition
