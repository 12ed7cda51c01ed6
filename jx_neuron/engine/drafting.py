"""Drafts: tokens that may follow a sequence, which one step of the model verifies."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np

FIRST, MOST = 3, 15
"""Tokens of a sequence's first draft, and of any draft at most."""

MEMORY, POOR, MOST_PAUSES = 0.9, 0.25, 6
"""Where less than the part POOR of what was drafted is accepted, each draft counting MEMORY times as much as the next,
sequences go on without drafts for a while, which doubles MOST_PAUSES times at most."""


class Drafter(Protocol):
    """Guesses what follows. A guess changes how fast tokens come, and never which.

    pause: turns of a sequence without drafts, after poor ones; 0 for none.

    One that drafts from the model's hidden states is a `FeatureDrafter`.
    """

    pause: int

    def propose(self, rows: "SequenceOf[Speculation]") -> SequenceOf[SequenceOf[int]]:
        """For each row up to `row.wanted` tokens that may follow `row.tokens`; none where it has no guess."""
        ...

    def close(self, row: "Speculation") -> None:
        """The row has ended."""
        ...


@runtime_checkable
class FeatureDrafter(Drafter, Protocol):
    """A drafter that takes what enters some of the model's layers."""

    @property
    def taps(self) -> SequenceOf[int]:
        """These layers."""
        ...

    def take(self, row: "Speculation", start: int, features_tid: np.ndarray) -> None:
        """What entered the layers `taps`, [t, i, d], at the row's positions from `start` on. Positions that the
        model computes a second time are taken again."""
        ...

    def reserve(self, rows: int, positions: int) -> None:
        """Readies the drafter for as many rows of as many positions: no draft waits for a compilation afterwards."""
        ...


def taps_of(drafters: Iterable[Drafter | None]) -> tuple[int, ...]:
    """The layers, ascending, whose inputs any of `drafters` takes."""
    return tuple(sorted({tap for drafter in drafters if isinstance(drafter, FeatureDrafter) for tap in drafter.taps}))


class Drafts(NamedTuple):
    """Counts of drafts: tokens proposed, tokens accepted, and the steps that verified them."""

    proposed: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass(eq=False)
class Speculation:
    """The drafts of one sequence. How long they are follows from how many tokens of the last were accepted.

    tokens: the sequence's own list, which grows.
    wanted: how many tokens the next draft may have.
    wait:   turns without a draft that are still to come.
    """

    drafter: Drafter
    tokens: list[int]
    wanted: int = 0
    wait: int = 0
    drafts: Drafts = field(default_factory=Drafts)
    _length: int = FIRST
    _proposed: float = FIRST
    _accepted: float = FIRST / 2
    _pauses: int = 0

    @property
    def proven(self) -> bool:
        """Whether tokens of recent drafts were accepted."""
        return self.drafts.accepted > 0 and not self._pauses

    def is_due(self, room: int) -> bool:
        """Whether to make a draft now, of at most `room` tokens."""
        if self.wait:
            self.wait -= 1
            return False
        self.wanted = min(self._length, room)
        return self.wanted > 0

    def close(self) -> None:
        """The sequence has ended."""
        self.drafter.close(self)

    def verified(self, proposed: int, accepted: int) -> None:
        """Takes how many tokens of a draft were accepted."""
        total = self.drafts
        self.drafts = Drafts(total.proposed + proposed, total.accepted + accepted, total.steps + 1)
        grown = max(self._length, 2 * proposed + 1) if accepted == proposed else accepted + 1
        self._length = min(grown, MOST)
        self._proposed, self._accepted = MEMORY * self._proposed + proposed, MEMORY * self._accepted + accepted
        if self._accepted < POOR * self._proposed:
            self.wait = self.drafter.pause << self._pauses
            self._pauses = min(self._pauses + 1, MOST_PAUSES)
        else:
            self._pauses = 0


@dataclass(eq=False)
class NgramDrafter:
    """Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding): what followed the last tokens where they
    were before, in prompt or answer.

    The longest n-gram of up to `most` tokens counts. Of its places, the first at or behind the one where the last draft
    would go on counts, since copies go forwards; otherwise the latest. A single token gives a draft of one token.
    """

    most: int = 5
    pause: int = 1
    _copies: "WeakKeyDictionary[Speculation, _Copy]" = field(default_factory=WeakKeyDictionary)

    def propose(self, rows: SequenceOf[Speculation]) -> SequenceOf[SequenceOf[int]]:
        return [self._after(row) for row in rows]

    def close(self, row: Speculation) -> None:
        self._copies.pop(row, None)

    def _after(self, row: Speculation) -> SequenceOf[int]:
        copy, length = self._copies.setdefault(row, _Copy()), len(row.tokens)
        copy.tokens.extend(row.tokens[len(copy.tokens) :])
        size, end_n = _places(np.frombuffer(copy.tokens, np.int32), self.most)
        if not size:
            return ()
        next_n = end_n[end_n >= length - copy.distance]
        distance = length - int(next_n[0] if len(next_n) else end_n[-1])
        if size == 1:
            return [row.tokens[length - distance]]
        copy.distance = distance
        # what would follow the last token is the draft itself
        return [row.tokens[length - distance + number % distance] for number in range(row.wanted)]


@dataclass(eq=False)
class _Copy:
    """The tokens of a row, and how far before the end is what it copies."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    distance: int = 0


def _places(token_t: np.ndarray, most: int) -> tuple[int, np.ndarray]:
    """The size, up to `most`, of the longest n-gram at the end that was there before, and where it ended, ascending."""
    end_n = 1 + np.flatnonzero(token_t[:-1] == token_t[-1])
    size = min(len(end_n), 1)
    while 0 < size < most:
        longer_n = end_n[(end_n > size) & (token_t[end_n - size - 1] == token_t[-size - 1])]
        if not len(longer_n):
            break
        size, end_n = size + 1, longer_n
    return size, end_n
