"""The slots of the state table: the owner and tokens of each, and which tokens of a sequence may be taken from one."""

import weakref
from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from jx_neuron.engine.rotations import Rotations
from jx_neuron.engine.sequence import Sequence
from jx_neuron.step.buckets import fit

Copy = tuple[int, int]
"""A slot to copy from, and the one to copy to."""


@dataclass
class Slot:
    """A slot's owner; without one, its tokens, their former owner, and the adapter that computed them."""

    owner: "weakref.ref[Sequence] | None" = None
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    former: "weakref.ref[Sequence] | None" = None
    extent: int = 0
    of_adapter: int = 0

    @property
    def sequence(self) -> Sequence | None:
        """The owner; None without one."""
        return self.owner() if self.owner is not None else None

    @property
    def written(self) -> int:
        """The most tokens that the slot held since its first."""
        owner = self.sequence
        return self.extent if owner is None else owner.written

    @property
    def adapter(self) -> int:
        """The number of the adapter that computed the slot's contents."""
        owner = self.sequence
        return self.of_adapter if owner is None else owner.adapter


class _Choice(NamedTuple):
    """A slot for a sequence, the slot to copy from (None for nothing), and how many of its tokens that holds."""

    number: int
    source: int | None
    held: int


class Slots:
    """As many slots as a decode step has rows at most; one more may hold a kept prefix.

    chunk:     a prompt takes a multiple of this number of tokens from another that begins like it, as it would
               compute them itself, unless `take_any` was called.
    rotations: how RoPE depends on a prompt's length, None where it does not.
    window:    how many of a sequence's last positions every layer keeps; None for all. A slot that holds more than
               that can go back by one token; by none where the window is 0, as with recurrent layers.
    """

    def __init__(self, count: int, chunk: int, rotations: Rotations | None = None, window: int | None = None):
        self._count, self._chunk, self._rotations, self._window = count, chunk, rotations, window
        self._least: int | None = None
        self._slots = [Slot() for _ in range(count)]
        self.prefix: list[int] = []
        """Tokens that are kept for sequences that start with them: their slot is taken by others last."""
        self._prefix_adapter = 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def take_any(self, least: int) -> None:
        """Has a sequence take any number of tokens from another that begins like it, drawn ones too, but not fewer than
        `least`, which are sooner computed than copied."""
        self._least = least

    @property
    def free(self) -> int:
        """Slots without an owner."""
        return sum(slot.sequence is None for slot in self._slots)

    def keep_prefix(self, sequence: Sequence | None, *, aside: bool) -> int | None:
        """Keeps the tokens of a computed sequence, or None, in its slot, for sequences that start with them.

        aside: in a slot behind the decoding ones. Its number is returned, and the caller copies the sequence there.
        """
        del self._slots[self._count :]
        self.prefix, self._prefix_adapter = ([], 0) if sequence is None else (list(sequence.tokens), sequence.adapter)
        if sequence is None or not aside:
            return None
        kept = Slot(None, self.prefix, sequence.prompt, extent=sequence.written, of_adapter=sequence.adapter)
        self._slots.append(kept)
        return len(self._slots) - 1

    def forget(self) -> None:
        """Has no slot hold anything, nor an owner."""
        lost = [sequence for slot in self._slots if (sequence := slot.sequence) is not None]
        self._slots = [Slot() for _ in self._slots]
        for sequence in lost:
            sequence.slot, sequence.computed, sequence.pending = None, 0, 0

    def admit(self, sequence: Sequence, running: Collection[Sequence], clock: int) -> tuple[list[Copy], int] | None:
        """Gives a sequence a slot. Returns the copies to make there, and how many tokens of the sequence it then has.

        None where all slots are of `running` sequences. Others lose theirs, that which was used longest ago first.
        """
        choice = self._choose(sequence, running)
        if choice is None:
            return None
        number, source, held = choice
        written = self._slots[number if source is None else source].written
        self._slots[number] = Slot(weakref.ref(sequence))
        sequence.slot, sequence.computed, sequence.pending, sequence.source = number, held, 0, None
        sequence.written, sequence.used, sequence.again = written if held else 0, clock, False
        return [] if source in (None, number) else [(source, number)], held

    def release(self, sequence: Sequence) -> None:
        """Ends a sequence's ownership; the tokens in its slot may serve others."""
        if sequence.slot is not None:
            valid = min(sequence.computed, len(sequence.tokens))
            self._slots[sequence.slot] = Slot(
                None,
                sequence.tokens[:valid],
                sequence.prompt,
                weakref.ref(sequence),
                sequence.written,
                sequence.adapter,
            )
            sequence.slot = None

    def compact(self, stepwise: SequenceOf[Sequence], sizes: SequenceOf[int]) -> list[Copy]:
        """Moves sequences to lower slots where a decode step of fewer rows, of `sizes`, then takes all."""
        owned = [slot.sequence for slot in self._slots if slot.sequence is not None]
        least = fit(sizes, len(owned))
        if not stepwise or fit(sizes, 1 + max(s.slot or 0 for s in stepwise)) <= least:
            return []
        moves = []
        free = [number for number in range(least) if self._slots[number].sequence is None]
        for sequence in owned:
            if sequence is not None and sequence.slot is not None and sequence.slot >= least:
                source, target = sequence.slot, free.pop(0)
                self._slots[source], self._slots[target] = Slot(), self._slots[source]
                sequence.slot = target
                moves.append((source, target))
        return moves

    def is_lost(self, count: int, written: int) -> bool:
        """Whether a slot that was written up to `written` holds no longer what follows on `count` tokens."""
        if self._window is None or written <= self._window:
            return False
        return count < written - (1 if self._window else 0)

    def reusable(self, sequence: Sequence, slot: Slot) -> int:
        """How many tokens of a sequence may be taken from a slot.

        Of its source or the kept prefix any number; else whole chunks of a prompt, or what `take_any` says.
        None where the slot has lost what would follow on them.
        """
        count = self._shared(sequence, slot)
        return 0 if self.is_lost(count, slot.written) else count

    def _choose(self, sequence: Sequence, running: Collection[Sequence]) -> _Choice | None:
        reusable = [self.reusable(sequence, slot) for slot in self._slots]
        free = [number for number in range(self._count) if self._slots[number].sequence is None]
        source = max(range(len(reusable)), key=lambda number: (reusable[number], number in free))
        if reusable[source] and source in free:
            return _Choice(source, source, reusable[source])
        if not free:
            owners = [owner for slot in self._slots if (owner := slot.sequence) is not None]
            idle = [owner for owner in owners if owner not in running]
            if not idle:
                return None
            oldest = min(idle, key=lambda owner: owner.used)
            free = [number for number, slot in enumerate(self._slots) if slot.sequence is oldest]
            self.release(oldest)
            oldest.computed = 0
            reusable[free[0]] = 0
        number = min(free, key=lambda number: (self._keeps_prefix(self._slots[number]), number))
        return _Choice(number, source if reusable[source] else None, reusable[source])

    def _shared(self, sequence: Sequence, slot: Slot) -> int:
        if (sequence.every_logits and sequence.source is None) or slot.adapter != sequence.adapter:
            return 0
        owner = slot.sequence
        if owner is None:
            tokens, valid, prompt = slot.tokens, len(slot.tokens), slot.prompt
        else:
            tokens, valid, prompt = owner.tokens, min(owner.computed, len(owner.tokens)), owner.prompt
        valid = min(valid, len(sequence.tokens) - 1)
        if valid < 1:
            return 0
        former = slot.former() if slot.former is not None else None
        if sequence.source is not None and sequence.source in (owner, former):
            return _common(tokens, sequence.tokens, valid)
        if self._rotations is not None:
            if not self._rotations.same(prompt, sequence.prompt):
                return 0
            valid = min(valid, prompt, sequence.prompt)
        prefix = min(len(self.prefix), valid) if self._prefix_adapter == sequence.adapter else 0
        if prefix and sequence.tokens[: len(self.prefix)] == self.prefix and tokens[:prefix] == self.prefix[:prefix]:
            return prefix
        if self._least is None:
            return _common(tokens, sequence.tokens, min(valid, prompt, sequence.prompt)) // self._chunk * self._chunk
        count = _common(tokens, sequence.tokens, valid)
        return count if count >= self._least else 0

    def _keeps_prefix(self, slot: Slot) -> bool:
        same = slot.adapter == self._prefix_adapter
        return bool(self.prefix) and same and slot.tokens[: len(self.prefix)] == self.prefix


def _common(a: SequenceOf[int], b: SequenceOf[int], most: int) -> int:
    """How many tokens two sequences have in common from their beginning, up to `most`."""
    if a[:most] == b[:most]:
        return most
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
