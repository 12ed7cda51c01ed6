"""Continuous batching by transformers-neuronx's protocol: each row of a call names its sequence and its positions."""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from jx_neuron.engine import prompts
from jx_neuron.engine.collector import DrawnToken
from jx_neuron.engine.draw import Draw
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.rows import logits_of
from jx_neuron.engine.sequence import Sequence
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integers, plain, shown


@dataclass(frozen=True)
class Piece:
    """Tokens of the sequence `number`, the first of them at position `start`; at 0, the sequence begins again."""

    number: int
    start: int
    tokens: list[int]


def pieces_of(ids_nt: np.ndarray, cache_ids: Any, start_ids: Any, sequences: int, capacity: int) -> list[Piece]:
    """The rows of a call, without padding.

    cache_ids: [n, t], the position of each token: from the first on they follow each other; 0 behind these is padding.
    start_ids: [n] or [n, 1], the number of each row's sequence, below `sequences`.

    Raises InputError for anything else, and for positions beyond `capacity`.
    """
    n, t = ids_nt.shape
    number_n = integers("start_ids", _flat(start_ids), least=0, most=sequences - 1)
    if len(set(number_n)) != n or len(number_n) != n:
        raise InputError(f"start_ids={shown(number_n)} must be {n} different sequences, one for each row of input_ids")
    if cache_ids is None:
        raise InputError("start_ids name sequences, and take cache_ids [n, t], the position of each token")
    position_nt = np.array(integers("cache_ids", _flat(cache_ids), least=0))
    if position_nt.size != n * t:
        raise InputError(f"cache_ids must be [{n}, {t}], as input_ids are: the position of each token")
    position_nt = position_nt.reshape(n, t)
    pieces = []
    for row, (number, tokens, position_t) in enumerate(zip(number_n, ids_nt.tolist(), position_nt, strict=True)):
        start = int(position_t[0])
        count = int((position_t == start + np.arange(t)).cumprod().sum())
        if position_t[count:].any():
            raise InputError(
                f"row {row} of cache_ids, {shown(position_t.tolist())}, must be positions that follow each other, and "
                "0 where input_ids have padding on the right"
            )
        prompts.check_end(start + count, capacity)
        pieces.append(Piece(number, start, tokens[:count]))
    return pieces


def _flat(value: Any) -> Any:
    """The numbers of an array or of nested lists, as one list."""
    numbers = plain(value)
    if not isinstance(numbers, list | tuple):
        return numbers
    return [number for one in numbers for number in (_flat(one) if isinstance(one, list | tuple) else [one])]


@dataclass
class NumberedSequences:
    """The sequences of a model by number. Any thread may continue any of them.

    A sequence keeps its slot until it begins again, or other requests need the slot; then it is computed again when it
    goes on.
    """

    _sequences: dict[int, Sequence] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def logits(self, engine: Engine, pieces: SequenceOf[Piece], every: bool) -> np.ndarray:
        """Logits after each piece, float32 [n, v]; with `every`, after each of its tokens [n, t, v], and 0 behind them.

        Raises InputError where a sequence has fewer tokens than a piece starts at.
        """
        with self._continued(engine, pieces) as sequences:
            first_n = [piece.start if every else len(s.tokens) - 1 for piece, s in zip(pieces, sequences, strict=True)]
            logits_ntv = logits_of(engine, sequences, first_n, every)
            return logits_ntv if every else logits_ntv[:, 0]

    def draw(self, engine: Engine, pieces: SequenceOf[Piece], draws: SequenceOf[Draw]) -> np.ndarray:
        """Draws the token after each piece, int64 [n, 1]; the sequence does not have it until it is given.

        Raises InputError where a sequence has fewer tokens than a piece starts at.
        """
        with self._continued(engine, pieces) as sequences:
            sinks = [DrawnToken(engine, n, draw) for n, draw in enumerate(draws)]
            lengths = [len(sequence.tokens) for sequence in sequences]
            for sequence, sink, draw in zip(sequences, sinks, draws, strict=True):
                sequence.sink, sequence.drawing = sink, draw if draw.fused else None
                sequence.limit = len(sequence.tokens) + 1
            engine.compute(sequences)
            for sequence, length in zip(sequences, lengths, strict=True):
                sequence.crop(length)
            return np.array([[sink.token] for sink in sinks])

    @contextmanager
    def _continued(self, engine: Engine, pieces: SequenceOf[Piece]) -> Iterator[list[Sequence]]:
        """The sequences of `pieces`, to be computed. An error while they are makes the next piece begin again."""
        with self._lock:
            for piece in pieces:
                length = len(self._sequences[piece.number].tokens) if piece.number in self._sequences else 0
                if piece.start > length:
                    raise InputError(
                        f"sequence {piece.number} has {length} tokens, and cache_ids go on at position {piece.start}; "
                        "go on where it ends or before, or begin with its whole prompt, at 0"
                    )
            sequences = [self._continue(engine, piece) for piece in pieces]
            try:
                yield sequences
            except BaseException:
                engine.closing.extend(sequences)
                for piece in pieces:
                    del self._sequences[piece.number]
                raise

    def _continue(self, engine: Engine, piece: Piece) -> Sequence:
        former = self._sequences.get(piece.number)
        if former is not None and piece.start:
            former.crop(piece.start)
            former.extend(piece.tokens)
            return former
        if former is not None:
            engine.closing.append(former)
        sequence = self._sequences[piece.number] = Sequence(piece.tokens)
        return sequence
