"""The inputs and outputs of one step, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from jx_neuron.step.program_key import ProgramKey

DRAWN_LAST = -1
"""In place of a token of a decode step: the token that the slot drew last, which is in the state table."""


class Drawing(Protocol):
    """How a program draws a sequence's tokens; the numbers are those of `jx_neuron.nn.sampling.Sampling`."""

    @property
    def candidates(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    def uniform(self, index: int) -> float:
        """The uniform number of the answer's token `index`."""
        ...


@dataclass(frozen=True)
class StepRow:
    """Tokens of one sequence in a step.

    slot:    where they go; the row itself in a program that is `in_place`.
    tokens:  ids, or DRAWN_LAST.
    start:   the position of the first; -1 - n for position n after a draft, see `step`.
    length:  how many tokens the sequence has from `start` on; RoPE may depend on it.
    drawing: how the program draws; None where nobody reads what it draws.
    index:   which token of the answer it draws first, from 0.
    drawn:   how many it draws, behind the last of `tokens`; more than 1 to verify.
    adapter: the number of its adapter; 0 for none.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    length: int
    drawing: Drawing | None = None
    index: int = 0
    drawn: int = 1
    adapter: int = 0


@dataclass(frozen=True)
class StepInput:
    """The inputs of one program: numpy arrays of the shapes and dtypes of `key.inputs()`, by name."""

    key: ProgramKey
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, key: ProgramKey, rows: Sequence[StepRow], slots: int, adapters: bool = False) -> Self:
        """The inputs for `rows`, in order, or in place by slot. The others name slots below `slots` and have no tokens,
        so that these stay as they are."""
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in key.inputs(adapters=adapters).items()}
        for name in ("temperature_b", "top_k_b", "top_p_b"):
            if name in arrays:
                arrays[name][:] = 1
        if not key.in_place:
            taken = [row.slot for row in rows]
            others = [slot for slot in range(slots) if slot not in taken]
            arrays["slot_b"][:] = [*taken, *others][: key.rows]
        for number, row in enumerate(rows):
            index = row.slot if key.in_place else number
            arrays["tokens_bt"][index, : len(row.tokens)] = row.tokens
            arrays["start_b"][index], arrays["length_b"][index] = row.start, row.length
            if adapters:
                arrays["adapter_b"][index] = row.adapter
            if (drawing := row.drawing) is not None and key.candidates > 1:
                arrays["temperature_b"][index], arrays["top_k_b"][index] = drawing.temperature, drawing.top_k
                arrays["top_p_b"][index] = drawing.top_p
                numbers = arrays["uniform_bt" if key.kind == "verify" else "uniform_b"].reshape(key.rows, -1)[index]
                first = len(row.tokens) - row.drawn if key.kind == "verify" else 0
                numbers[first : first + row.drawn] = [drawing.uniform(row.index + n) for n in range(row.drawn)]
        return cls(key, arrays)


class StepOutput(NamedTuple):
    """The outputs of one program. The arrays may be asynchronous: reading them with numpy waits.

    token_b1: the next token of each row, int32 [b, 1]; of a "verify" that of each token, [b, t].
    logits:   float32 [b, v], or [b, t, v] of a "score" or "verify"; v padded to the tensor-parallel degree.
    features: what enters each layer of `key.taps`, [b, t, i, d] in the model's dtype; None without any.
    """

    token_b1: Any
    logits: Any
    features: Any = None
