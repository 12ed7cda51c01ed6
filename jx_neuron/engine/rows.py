"""Rows of tokens that a caller continues: calling the model, and HF's `generate()`."""

import threading
from collections.abc import Sequence as SequenceOf

import numpy as np

from jx_neuron.engine import prompts
from jx_neuron.engine.collector import Collector
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.sequence import Sequence
from jx_neuron.errors import InputError


def logits_of(engine: Engine, sequences: SequenceOf[Sequence], first_n: SequenceOf[int], every: bool) -> np.ndarray:
    """Computes sequences. Returns logits of their tokens from positions `first_n` on, [n, t, v], 0 after an end.

    every: whether these are not the last tokens alone.
    """
    sinks = [Collector(engine, n, every=every, first=first) for n, first in enumerate(first_n)]
    for sequence, sink in zip(sequences, sinks, strict=True):
        sequence.sink, sequence.every_logits = sink, every
    engine.compute(sequences)
    width = max(len(sequence.tokens) - first for sequence, first in zip(sequences, first_n, strict=True))
    logits_ntv = np.zeros((len(sequences), width, engine.vocab_size), np.float32)
    for row_tv, sink, first in zip(logits_ntv, sinks, first_n, strict=True):
        for begin, part_tv in sink.parts:
            row_tv[begin - first : begin - first + len(part_tv)] = part_tv
    return logits_ntv


class Rows:
    """Sequences whose tokens the caller gives, at first and later.

    They keep slots of the engine's state table until other sequences need these. A sequence that has lost its slot is
    computed again when it is extended.
    """

    def __init__(self, engine: Engine, rows: SequenceOf[np.ndarray], adapters: SequenceOf[int] | None = None):
        """adapters: the number of each row's adapter; None for none."""
        self._engine = engine
        self._sequences = [
            Sequence(row.tolist(), adapter=adapter, sink=Collector(engine))
            for row, adapter in zip(rows, adapters or [0] * len(rows), strict=True)
        ]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self._sequences)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, int32 [n]."""
        return np.array([len(sequence.tokens) for sequence in self._sequences], np.int32)

    def logits(self, every: bool = False) -> np.ndarray:
        """Logits of each row's last token, float32 [n, v]; with `every`, of all [n, t, v], 0 after a row's end."""
        first_n = np.zeros(self.count, int) if every else self.lengths - 1
        logits_ntv = self._compute(first_n, every)
        return logits_ntv if every else logits_ntv[:, 0]

    def extend(self, tokens_nt: np.ndarray, every: bool = False) -> np.ndarray:
        """Appends tokens [n, t]. Returns their logits, float32 [n, t, v], or those of the last token, [n, 1, v].

        Raises InputError where they exceed the capacity.
        """
        capacity = self._engine.scheduler.buckets.capacity
        prompts.check_end(int(self.lengths.max()) + tokens_nt.shape[1], capacity)
        first_n = self.lengths
        for sequence, tokens in zip(self._sequences, tokens_nt.tolist(), strict=True):
            sequence.extend(tokens)
        return self._compute(first_n if every else self.lengths - 1, every)

    def reorder(self, index_n: np.ndarray) -> None:
        """Row i becomes row `index_n[i]`."""
        sequences: list[Sequence] = []
        for index in index_n.tolist():
            source = self._sequences[index]
            sequences.append(source.fork() if source in sequences else source)
        self._engine.closing.extend(sequence for sequence in self._sequences if sequence not in sequences)
        self._sequences = sequences

    def crop(self, tokens: int) -> None:
        """Removes the last `tokens` tokens of each row."""
        for sequence in self._sequences:
            sequence.crop(max(len(sequence.tokens) - tokens, 0))

    def seek(self, start_n: np.ndarray) -> None:
        """Crops each row so that its next token is at position `start_n` [n]. Raises InputError where that leaves a
        gap."""
        if len(start_n) != self.count or (start_n > self.lengths).any():
            raise InputError(
                f"{len(start_n)} rows cannot go on at positions {start_n.tolist()}: the last call left {self.count} "
                f"rows of {self.lengths.tolist()} tokens; go on with as many, at most at those positions"
            )
        for sequence, start in zip(self._sequences, start_n.tolist(), strict=True):
            sequence.crop(start)

    def close(self) -> None:
        """Frees the slots."""
        self._engine.closing.extend(self._sequences)

    def _compute(self, first_n: np.ndarray, every: bool) -> np.ndarray:
        return logits_of(self._engine, self._sequences, first_n.tolist(), every)


class LastRows(threading.local):
    """The rows of a thread's last call of the model, which its next call may continue."""

    _rows: Rows | None = None

    def begin(self, engine: Engine, rows: SequenceOf[np.ndarray], adapters: SequenceOf[int]) -> Rows:
        """Replaces the rows by new ones, of adapters by number."""
        self._rows = Rows(engine, rows, adapters)
        return self._rows

    def at(self, start_n: np.ndarray) -> Rows:
        """The rows, cropped so that each one's next token is at position `start_n` [n].

        Raises InputError where there are none.
        """
        if self._rows is None:
            raise InputError(
                "cache_ids go on from the last call of the model in this thread, and there was none since it last "
                "sampled or scored; begin with the whole prompt, without cache_ids"
            )
        self._rows.seek(start_n)
        return self._rows

    def close(self) -> None:
        """Frees the rows' slots."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None
