"""A smaller model as a drafter: it draws greedily, in slots of its own."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import takewhile
from weakref import WeakKeyDictionary

import numpy as np

from jx_neuron.engine.drafting import Speculation
from jx_neuron.engine.draw import Draw
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.sequence import Row, Sequence
from jx_neuron.nn.sampling import NOT_FINITE

PROBED = 32
"""The last tokens of a sequence, which a draft model reads alone until a token that it drafted is accepted: a poor one
takes no time for long prompts."""

GREEDY = Draw(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, min_tokens=1, candidates=1, key=None)


@dataclass(eq=False)
class ModelDrafter:
    """Drafts by the engine of another model, whose tokens are the same ones, for rows of up to `positions`.

    A draft is the model's likeliest tokens, also where the target samples: it draws the likeliest most often.
    """

    engine: Engine
    positions: int
    pause: int = 128
    _twins: "WeakKeyDictionary[Speculation, _Twin]" = field(default_factory=WeakKeyDictionary)

    def propose(self, rows: SequenceOf[Speculation]) -> SequenceOf[SequenceOf[int]]:
        for row in rows:
            if row not in self._twins:
                self._twins[row] = _Twin(self.engine, row.tokens)
        twins = [self._twins[row] for row in rows]
        following = [twin for twin, row in zip(twins, rows, strict=True) if twin.follow(row, self.positions)]
        if following:
            self.engine.compute([twin.sequence for twin in following])
        return [twin.sequence.tokens[twin.known :] if twin in following else () for twin in twins]

    def close(self, row: Speculation) -> None:
        if (twin := self._twins.pop(row, None)) is not None:
            self.engine.closing.append(twin.sequence)


class _Twin:
    """A row in the draft model: its sequence there, and the sink of what that draws.

    first: the number of the row's token that the sequence begins with.
    known: how many tokens of the sequence are the row's; those after them are a draft.
    """

    on_host = False

    def __init__(self, engine: Engine, tokens: SequenceOf[int]):
        self._engine, self.first, self.known = engine, 0, 0
        self.sequence = Sequence(list(tokens), drawing=GREEDY, sink=self)
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return len(self.sequence.tokens) >= self.sequence.limit

    def follow(self, row: Speculation, positions: int) -> bool:
        """Makes the sequence what the row is, to draw the next draft. False where it has no room, or lacks a token."""
        sequence, first = self.sequence, self.first
        if row.proven:
            first = 0
        elif len(row.tokens) - first - sequence.computed > PROBED:
            first = len(row.tokens) - PROBED
        if first != self.first:
            sequence.crop(0)
            self.first, self.known = first, 0
        new = row.tokens[first + self.known :]
        limit = len(row.tokens) - first + row.wanted + 1  # the last is dropped: with it, the draft's own are computed
        if limit > positions or max(new, default=0) >= self._engine.vocab_size:
            return False
        pairs = zip(sequence.tokens[self.known :], new, strict=False)
        alike = self.known + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        alike = min(alike, len(row.tokens) - first - 1)  # or nothing would be left to compute
        sequence.crop(alike)
        sequence.extend(row.tokens[first + alike :])
        sequence.limit, self.known = limit, len(row.tokens) - first
        return True

    def wants_logits(self, row: Row) -> bool:
        return False

    def take(self, row: Row, token: int, logits: np.ndarray | None) -> None:
        if not row.last:
            return
        if token == NOT_FINITE:
            self._engine.poison(self.sequence)
            raise self._engine.not_finite(row.index)
        self._engine.scheduler.take(self.sequence, token)

    def fail(self, error: Exception) -> None:
        self.error = error
