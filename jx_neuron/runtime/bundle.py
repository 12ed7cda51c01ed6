"""What a runtime without model code needs: programs with their inputs and outputs, and each rank's weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.step.shape import Shape


class Tensor(Protocol):
    """One input or output of a program; `shape` is that of one core."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def partition(self) -> tuple[str | None, ...]: ...
    @property
    def alias(self) -> int | None: ...


class Lowered(Protocol):
    """One program's inputs and outputs in order."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> Sequence[Tensor]: ...
    @property
    def outputs(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Bundle:
    """A lowered model.

    programs: by the shape each is for.
    hlo:      gives a program's serialized HloModuleProto by name.
    neff:     gives a program's NEFF by name, or None.
    weights:  gives a rank's parameters by name.
    """

    tp_degree: int
    programs: Mapping[Shape, Lowered]
    hlo: Callable[[str], bytes] = field(repr=False)
    neff: Callable[[str], bytes | None] = field(repr=False)
    weights: Callable[[int], Mapping[str, np.ndarray]] = field(repr=False)

    @property
    def candidates(self) -> int:
        """How many candidates its programs sample from."""
        return max(shape.candidates for shape in self.programs)

    def find(self, shape: Shape) -> Lowered:
        """The program of `shape`. Raises InputError that lists those there are."""
        if shape not in self.programs:
            raise InputError(
                f"no program {shape.name} was compiled; there are {', '.join(sorted(s.name for s in self.programs))}. "
                "Compile the model anew with the batch size, buckets and options that this call needs"
            )
        return self.programs[shape]

    def of_kind(self, kind: str) -> list[Tensor]:
        """The inputs of a kind, "param" or "cache", in order; they are the same in every program."""
        return [tensor for tensor in next(iter(self.programs.values())).inputs if tensor.kind == kind]


class Joined:
    """The parts of an array that is split among cores, joined when it is read."""

    def __init__(self, ranks: Sequence[Any], axis: int):
        self._ranks, self._axis = ranks, axis

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate([np.asarray(rank) for rank in self._ranks], axis=self._axis)
        return whole if dtype is None else whole.astype(dtype)
