"""The interface of runtimes, which run steps."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput


class Runtime(Protocol):
    """Holds parameters and a state table on its devices, and runs steps on them."""

    @property
    def programs(self) -> frozenset[ProgramKey] | None:
        """The programs that it can run; None where programs are compiled on demand."""
        ...

    def load(self, programs: Iterable[ProgramKey]) -> None:
        """Loads or compiles programs, so that their first run does not wait; a thread may, while another runs steps."""
        ...

    def loaded(self, program: ProgramKey) -> bool:
        """Whether the program's first run does not wait."""
        ...

    def run(self, step: StepInput) -> StepOutput:
        """Runs a step on the state table. After an error the table may be invalid until `reset`."""
        ...

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        """Copies the state of slot source_n[i] to slot target_n[i], for all i at once."""
        ...

    def clear(self, slot_n: np.ndarray) -> None:
        """Fills slots with zeros. A slot with NaN needs it, since 0 · NaN is NaN even where attention is masked."""
        ...

    def reset(self, slots: int, positions: int) -> None:
        """Empties all slots. The next table has at least that number of slots and positions."""
        ...
