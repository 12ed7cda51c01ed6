"""LoRA adapters side by side: each row of a batch has one of them, or none (Hu et al., arXiv:2106.09685).

    y = x · W + x · A_i · B_i        i the row's adapter, A_0 and B_0 zeros

One program serves rows of any adapters, as in Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al.,
arXiv:2311.03285). Array suffixes are those of jx_neuron.nn.layers, i adapters and r their rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import ConfigDict, Field

from jx_neuron.nn.kernel import Indexed

MOST, MOST_RANK, LONGEST = 1024, 2**14, 256
"""Adapters of a model, the rank of any, and characters of a name."""

COUNT, RANK = "adapters", "rank"
"""The letters of the axes i and r in weight tables."""

PARTS = ("lora_a", "lora_b")
HEAD = "lm_head"

Name = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Target = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.{}]+\.(kernel|embedding)$", max_length=256)]


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    names:   of each; the first has number 1. Number 0 is none.
    rank:    of A and B, which are padded to it.
    targets: the matrices that have A and B, by path; {i} stands for every layer that has the matrix.
    """

    names: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST)]
    rank: Annotated[int, Field(ge=1, le=MOST_RANK)]
    targets: Annotated[tuple[Target, ...], Field(min_length=1, max_length=MOST)]

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    def __post_init__(self) -> None:
        if len({*self.names}) < len(self.names):
            raise ValueError(f"adapters {self.names} do not differ in their names")

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes i and r."""
        return {COUNT: 1 + len(self.names), RANK: self.rank}

    def paths(self, shapes: Mapping[str, Any], layers: int) -> list[str]:
        """The matrices among the parameters `shapes` that have A and B."""
        paths = [target.replace("{i}", str(layer)) for target in self.targets for layer in range(layers)]
        return [path for path in dict.fromkeys(paths) if path in shapes]


def part_of(path: str, part: str) -> str:
    """The path of A or B, "lora_a" or "lora_b", of a matrix."""
    return f"{path.rpartition('.')[0]}.{part}"


@partial(jax.tree_util.register_dataclass, data_fields=["array", "adapter_b", "layer"], meta_fields=[])
@dataclass(frozen=True)
class OfRows(Indexed):
    """A or B of every adapter, [i, …], or [l, i, …] of the layers of a stack, and which adapter each row has.

    layer: that of the stack whose A or B it is; None without a stack.
    """

    array: Array
    adapter_b: Array
    layer: Array | int | None = None

    def of_period(self, number: Array | int) -> "OfRows":
        return replace(self, layer=number)

    def gathered(self) -> Array:
        """That of each row: [b, …]."""
        array = self.array if self.layer is None else jax.lax.dynamic_index_in_dim(self.array, self.layer, 0, False)
        return jnp.take(array, self.adapter_b, axis=0, mode="clip")


def selected(params: Mapping[str, Any], adapter_b: Array) -> dict[str, Any]:
    """Parameters in which A and B are those of each row."""
    return {
        path: OfRows(array, adapter_b) if path.rpartition(".")[2] in PARTS else array for path, array in params.items()
    }


def matrices(module: nnx.Module) -> Iterator[str]:
    """The matrices of a module that can have A and B, by path: those of linear layers, and of a head of its own."""
    for path, node in nnx.iter_graph(module):
        name = next((name for name in ("kernel", "embedding") if hasattr(node, name)), None)
        if name and hasattr(node, PARTS[0]) and (name == "kernel" or path == (HEAD,)):
            yield ".".join(map(str, (*path, name)))


def attach(module: nnx.Module, shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> None:
    """Gives layers of a module of shapes A and B, whose shapes are by path."""
    for path, node in list(nnx.iter_graph(module)):
        for part in PARTS:
            if (shape := shapes.get(".".join(map(str, (*path, part))))) is not None:
                setattr(node, part, nnx.Param(jax.ShapeDtypeStruct(shape, dtype)))
