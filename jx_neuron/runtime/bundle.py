"""A lowered model for runtimes without model code: programs with their signatures, and parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jx_neuron.errors import CompilerError, InputError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.step.program_key import ProgramKey


@dataclass(frozen=True)
class Bundle:
    """A lowered model.

    programs:   the signature of each program, by key.
    hlo:        returns a program's serialized HloModuleProto by name.
    neff:       returns a program's NEFF by name, or None.
    parameters: of each parameter the parts of `ranks`, by name, possibly read at access.
    own:        the ranks of this process; None where it has all.
    """

    programs: Mapping[ProgramKey, ProgramSpec]
    hlo: Callable[[str], bytes] = field(repr=False)
    neff: Callable[[str], bytes | None] = field(repr=False)
    parameters: Mapping[str, Sequence[np.ndarray]] = field(repr=False)
    own: range | None = None

    @property
    def tp_degree(self) -> int:
        """The number of cores that run its programs."""
        return next(iter(self.programs.values())).tp_degree

    @property
    def ranks(self) -> range:
        """The ranks that this process runs: some of `tp_degree`, one after another."""
        return range(self.tp_degree) if self.own is None else self.own

    @property
    def candidates(self) -> int:
        """The number of candidates that its programs sample from."""
        return max(key.candidates for key in self.programs)

    def find(self, key: ProgramKey) -> ProgramSpec:
        """The program of `key`. Raises InputError, which lists the programs, where there is none."""
        if key not in self.programs:
            raise InputError(
                f"no program {key.name} was compiled; there are {', '.join(sorted(k.name for k in self.programs))}. "
                "Compile the model again with the batch size, buckets and options that this call needs"
            )
        return self.programs[key]

    def require_neff(self, name: str) -> bytes:
        """The NEFF of a program. Raises CompilerError where it has none."""
        neff = self.neff(name)
        if neff is None:
            raise CompilerError(f"the program {name} has no NEFF; compile the model with neuronx-cc first")
        return neff

    def of_kind(self, kind: str) -> list[TensorSpec]:
        """The inputs of a kind, "param" or "state", in order. All programs have the same."""
        return [tensor for tensor in next(iter(self.programs.values())).inputs if tensor.kind == kind]


class Joined:
    """An array of which each core has a part along `axis`, or the whole array (None). Reading it joins the parts."""

    def __init__(self, ranks: Sequence[Any], axis: int | None):
        self._ranks, self._axis = ranks, axis

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._axis is None:
            return np.asarray(self._ranks[0], dtype)
        whole = np.concatenate([np.asarray(rank) for rank in self._ranks], axis=self._axis)
        return whole if dtype is None else whole.astype(dtype)
