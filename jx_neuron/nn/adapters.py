"""Which LoRA adapters a model has side by side, as plain data: saved models read it without any model code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

MOST, MOST_RANK, LONGEST = 1024, 2**14, 256
"""Adapters of a model, the rank of any, and characters of a name."""

COUNT, RANK = "adapters", "rank"
"""The letters of the axes i and r in weight tables."""

PARTS = ("lora_a", "lora_b")

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
