"""What a runtime without model code needs: programs with their inputs and outputs, and parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.step.program_key import ProgramKey


@dataclass(frozen=True)
class Bundle:
    """A lowered model.

    programs:   by the key of each.
    hlo:        gives a program's serialized HloModuleProto by name.
    neff:       gives a program's NEFF by name, or None.
    parameters: each rank's part of each, by name; they may be read when they are asked for.
    """

    programs: Mapping[ProgramKey, ProgramSpec]
    hlo: Callable[[str], bytes] = field(repr=False)
    neff: Callable[[str], bytes | None] = field(repr=False)
    parameters: Mapping[str, Sequence[np.ndarray]] = field(repr=False)

    @property
    def tp_degree(self) -> int:
        """How many cores run its programs."""
        return next(iter(self.programs.values())).tp_degree

    @property
    def candidates(self) -> int:
        """How many candidates its programs sample from."""
        return max(key.candidates for key in self.programs)

    def find(self, key: ProgramKey) -> ProgramSpec:
        """The program of `key`. Raises InputError that lists those there are."""
        if key not in self.programs:
            raise InputError(
                f"no program {key.name} was compiled; there are {', '.join(sorted(k.name for k in self.programs))}. "
                "Compile the model anew with the batch size, buckets and options that this call needs"
            )
        return self.programs[key]

    def of_kind(self, kind: str) -> list[TensorSpec]:
        """The inputs of a kind, "param" or "state", in order; they are the same in every program."""
        return [tensor for tensor in next(iter(self.programs.values())).inputs if tensor.kind == kind]


class Joined:
    """The parts of an array that is split among cores along `axis`, joined when it is read; None where it is whole."""

    def __init__(self, ranks: Sequence[Any], axis: int | None):
        self._ranks, self._axis = ranks, axis

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._axis is None:
            return np.asarray(self._ranks[0], dtype)
        whole = np.concatenate([np.asarray(rank) for rank in self._ranks], axis=self._axis)
        return whole if dtype is None else whole.astype(dtype)
