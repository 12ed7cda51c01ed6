"""Results after given tokens: logits, for callers that choose or score tokens themselves, or one sampled token."""

from typing import TYPE_CHECKING

import numpy as np

from jx_neuron.engine.draw import Draw
from jx_neuron.engine.sequence import Row
from jx_neuron.nn.sampling import NOT_FINITE

if TYPE_CHECKING:
    from jx_neuron.engine.engine import Engine


class Collector:
    """Collects the logits of one sequence, chunk by chunk.

    row:   index of the sequence in its call, for errors.
    every: True collects the logits of all tokens, False those of the last, None none.
    first: the position of the first token whose logits are collected.
    holds: whether the sequence keeps its slot once it is computed, even where others wait for one.

    Attributes:
        done:  whether all tokens are computed.
        parts: of each chunk, the position of its first token and its logits, float32 [t, v].
        error: the error of the sequence; None where there is none.
    """

    on_host = False

    def __init__(
        self, engine: "Engine", row: int = 0, *, every: bool | None = None, first: int = 0, holds: bool = False
    ):
        self._engine, self._row, self._every, self._first, self._holds = engine, row, every, first, holds
        self.done = False
        self.parts: list[tuple[int, np.ndarray]] = []
        self.error: Exception | None = None

    def wants_logits(self, row: Row) -> bool:
        """Whether the logits of a step's row are read."""
        return self._every is not None and (row.last or self._every) and row.start + row.count > self._first

    def take(self, row: Row, token: int, logits: np.ndarray | None) -> None:
        """Takes the outputs of a row: logits [t, v] of each token, or [v] of the last."""
        self.done |= row.last
        if row.last and not self._holds:
            self._engine.scheduler.pause(row.sequence)
        if logits is None:
            return
        if logits.ndim == 2:
            begin = max(row.start, self._first)
            logits_tv = logits[begin - row.start : row.count]
        else:
            begin, logits_tv = row.start + row.count - 1, logits[None]
        if not np.isfinite(logits_tv).all():
            self._engine.poison(row.sequence)
            raise self._engine.not_finite(self._row)
        self.add(begin, logits_tv)

    def add(self, begin: int, logits_tv: np.ndarray) -> None:
        """Adds logits [t, v] of the tokens from position `begin` on."""
        self.parts.append((begin, logits_tv))

    def fail(self, error: Exception) -> None:
        """Records an error."""
        self.error = error


class DrawnToken(Collector):
    """Takes the token that follows a sequence's last one, drawn by the program, or by the host where no program can.

    Attributes:
        token: the token, once `done`.
    """

    def __init__(self, engine: "Engine", row: int, draw: Draw):
        super().__init__(engine, row, every=None if draw.fused else False)
        self._draw, self.token = draw, NOT_FINITE

    def take(self, row: Row, token: int, logits: np.ndarray | None) -> None:
        """Takes the outputs of a row."""
        super().take(row, token, logits)
        if not row.last:
            return
        sequence = row.sequence
        if logits is not None:
            token = self._draw.choose(logits, len(sequence.tokens) - sequence.prompt)
        if token == NOT_FINITE:
            self._engine.poison(sequence)
            raise self._engine.not_finite(self._row)
        self._engine.scheduler.take(sequence, token)
        self.token = token
