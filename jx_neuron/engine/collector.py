"""Logits of given tokens, for a caller who chooses tokens or scores them."""

from typing import TYPE_CHECKING

import numpy as np

from jx_neuron.engine.scheduler import Row

if TYPE_CHECKING:
    from jx_neuron.engine.engine import Engine


class Collector:
    """Takes the logits of one sequence, chunk by chunk.

    row:   of the sequence in its call, for errors.
    every: whether logits of all tokens are wanted; False for the last token's, None for none.
    first: the position of the first token whose logits are wanted.
    holds: whether the sequence keeps its slot when it is computed, even where others wait for one.

    Attributes:
        done:  whether all tokens are computed.
        parts: position of the first token, and float32 logits [t, v], of each chunk.
        error: what went wrong, None where nothing did.
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
        """Whether it reads the logits of a step's row."""
        return self._every is not None and (row.last or self._every) and row.start + row.count > self._first

    def take(self, row: Row, token: int, logits: np.ndarray | None) -> None:
        """What a step gave for its row: logits [t, v] of each token, or [v] of the last."""
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
        """Logits [t, v] of the tokens from position `begin` on."""
        self.parts.append((begin, logits_tv))

    def fail(self, error: Exception) -> None:
        """Notes what went wrong."""
        self.error = error
