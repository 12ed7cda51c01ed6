"""An EAGLE-3 head as a drafter: it drafts from the hidden states of the model that verifies, in slots of its own."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from jx_neuron.engine.drafting import MOST, Speculation
from jx_neuron.runtime.base import Runtime
from jx_neuron.step.buckets import SMALLEST, fit
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput

TOKENS = (4, 8, 64, 512)
"""Most tokens of a sequence that a step computes: the ones that a verified draft has added, or a prompt's."""

GUESSES = (1, 3, 7, MOST)
"""Tokens of a draft, where that many are wanted or fewer."""


@dataclass(eq=False)
class EagleDrafter:
    """Drafts by a head, of which `runtime` runs the "draft" programs.

    taps: the layers of the target whose inputs a feature is made of, in the order of the feature.
    """

    runtime: Runtime
    taps: tuple[int, ...]
    pause: int = 1
    _twins: "WeakKeyDictionary[Speculation, _Twin]" = field(default_factory=WeakKeyDictionary)
    _least: tuple[int, int] = (1, SMALLEST)

    def take(self, row: Speculation, start: int, features_tid: np.ndarray) -> None:
        self._twins.setdefault(row, _Twin()).take(start, features_tid.reshape(len(features_tid), -1))

    def propose(self, rows: SequenceOf[Speculation]) -> SequenceOf[SequenceOf[int]]:
        drafts: dict[Speculation, list[int]] = {}
        following = [row for row in rows if row in self._twins and self._twins[row].follows(row.tokens)]
        for row in following:
            self._give_slot(self._twins[row])
        while long := [row for row in following if self._twins[row].count > TOKENS[-1]]:
            self._run(long, 1)
        if following:
            guesses = fit(GUESSES, max(row.wanted for row in following))
            token_bg = self._run(following, guesses)
            drafts = {row: token_bg[self._twins[row].slot, : row.wanted].tolist() for row in following}
        return [drafts.get(row, ()) for row in rows]

    def close(self, row: Speculation) -> None:
        self._twins.pop(row, None)

    def reserve(self, rows: int, positions: int) -> None:
        """Loads programs for as many rows and positions, which all drafts are made by from now on."""
        self._least = rows, positions + MOST
        sizes = dict.fromkeys(fit(TOKENS, min(tokens, positions)) for tokens in TOKENS)
        self.runtime.load([self._key(rows, tokens, 0, guesses) for tokens in sizes for guesses in GUESSES[:-1]])

    def _give_slot(self, twin: "_Twin") -> None:
        if twin.slot < 0:
            taken = {other.slot for other in self._twins.values()}
            twin.slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _run(self, rows: SequenceOf[Speculation], guesses: int) -> np.ndarray:
        """Computes up to TOKENS[-1] tokens of each row, and returns what is drawn behind them, [b, g]."""
        twins = [self._twins[row] for row in rows]
        counts = [min(twin.count, TOKENS[-1]) for twin in twins]
        end = max(twin.at + count for twin, count in zip(twins, counts, strict=True))
        key = self._key(1 + max(twin.slot for twin in twins), max(counts), end + guesses, guesses)
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in key.inputs().items()}
        width, dtype = twins[0].parts[0].shape[1], twins[0].parts[0].dtype
        features_bte = np.zeros((key.rows, key.tokens, width), dtype)
        for row, twin, count in zip(rows, twins, counts, strict=True):
            arrays["start_b"][twin.slot], arrays["length_b"][twin.slot] = twin.at, count
            arrays["tokens_bt"][twin.slot, :count] = row.tokens[twin.begin + 1 : twin.begin + 1 + count]
            features_bte[twin.slot, :count] = twin.pop(count)
        output = self.runtime.run(StepInput(key, {**arrays, "features_bte": features_bte}))
        return np.asarray(output.token_b1)

    def _key(self, rows: int, tokens: int, end: int, guesses: int) -> ProgramKey:
        """The program of at least as many rows, tokens and positions."""
        least_rows, least_positions = self._least
        tokens = fit(TOKENS, tokens)
        rows, positions = _grown(rows, least_rows), _grown(max(end, tokens + 1), least_positions)
        return ProgramKey("draft", rows, tokens, positions, guesses=guesses)


@dataclass(eq=False)
class _Twin:
    """A row in the head: entry i of its slot is of position first + i, and of the token behind that position.

    begin: the first position that the head has not computed from the target's features.
    parts: these features from there on, [t, e] each.
    """

    slot: int = -1
    first: int = 0
    begin: int = 0
    parts: list[np.ndarray] = field(default_factory=list)

    @property
    def at(self) -> int:
        """The entry of `begin`."""
        return self.begin - self.first

    @property
    def count(self) -> int:
        """How many positions there are to compute."""
        return sum(map(len, self.parts))

    def take(self, start: int, features_te: np.ndarray) -> None:
        """Takes features from position `start` on, in place of those there were. A sequence may begin behind tokens
        that others computed, which the head knows nothing of; its slot then begins there."""
        if not self.first <= start <= self.begin + self.count:
            self.first, self.begin, self.parts = start, start, []
        elif start < self.begin:
            self.begin, self.parts = start, []
        elif start < self.begin + self.count:
            self.parts = [np.concatenate(self.parts)[: start - self.begin]]
        self.parts.append(features_te)

    def follows(self, tokens: SequenceOf[int]) -> bool:
        """Whether it has features of all tokens but the last, and some to compute."""
        return bool(self.parts) and self.begin + self.count == len(tokens) - 1

    def pop(self, count: int) -> np.ndarray:
        """The first `count` features, [t, e], which count as computed."""
        features_te = np.concatenate(self.parts)
        self.parts = [features_te[count:]] if count < len(features_te) else []
        self.begin += count
        return features_te[:count]


def _grown(size: int, least: int) -> int:
    """`least`, or a power of two where that is too small."""
    return least if size <= least else 1 << (size - 1).bit_length()
