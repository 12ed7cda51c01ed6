"""Ways to run steps, behind one interface."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput


class Runtime(Protocol):
    """Holds parameters and a state table on its devices, and runs steps on them."""

    @property
    def programs(self) -> frozenset[ProgramKey] | None:
        """What it can run; None where programs are compiled on demand."""
        ...

    def load(self, programs: Iterable[ProgramKey]) -> None:
        """Makes programs ready."""
        ...

    def run(self, step: StepInput) -> StepOutput:
        """Runs a step on the state table. Where it fails, the table may be lost: `reset` makes another."""
        ...

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        """Slot target_n[i] becomes what slot source_n[i] was, for all i at once."""
        ...

    def clear(self, slot_n: np.ndarray) -> None:
        """Zeros in slots, such as those with numbers that are not finite: 0 · NaN is NaN, also where attention is
        masked."""
        ...

    def reset(self, slots: int, positions: int) -> None:
        """Forgets what all slots hold. The next table has room for as many slots and positions at least."""
        ...
