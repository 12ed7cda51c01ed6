"""The inputs and outputs of one step, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jx_neuron.step.program_key import ProgramKey

DRAWN_LAST = -1
"""In place of a token of a decode step: the token that the slot drew last, which is in the state table."""


@dataclass(frozen=True)
class StepInput:
    """The inputs of one program: numpy arrays of the shapes and dtypes of `key.inputs()`, by name."""

    key: ProgramKey
    arrays: Mapping[str, np.ndarray]


class StepOutput(NamedTuple):
    """The outputs of one program. The arrays may be asynchronous: reading them with numpy waits.

    token_b1: the next token of each row, int32 [b, 1]; of a "verify" that of each token, [b, t].
    logits:   float32 [b, v], or [b, t, v] of a "score" or "verify"; v padded to the tensor-parallel degree.
    """

    token_b1: Any
    logits: Any
