"""Which sequences go through the next step, and in which slots: pure Python over plain data, without JAX.

The scheduler gives waiting sequences slots, makes a turn of steps at a time, and takes the tokens that were drawn. A
turn may be planned before the tokens of the one before it are known: a decode step takes "the token that this slot drew
last".
"""

import math
import weakref
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from jx_neuron.engine.rotations import Rotations
from jx_neuron.engine.sequence import Plan, Row, Sequence, Turn
from jx_neuron.step.buckets import Buckets, fit
from jx_neuron.step.program_key import Kind, ProgramKey
from jx_neuron.step.step_input import DRAWN_LAST, StepInput

VERIFY_SIZES = (2, 4, 8)
"""Tokens of steps that verify drafts, where programs are compiled on demand. On a CPU, more tokens take longer each
(docs/speculation.md)."""

MOST_PASSED_OVER = 3
"""Turns that a prompt waits at most while others, of fewer remaining tokens, go before it; then it is next."""


@dataclass
class _Slot:
    """A slot's owner; without one, what it holds and whose that was."""

    owner: "weakref.ref[Sequence] | None" = None
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    former: "weakref.ref[Sequence] | None" = None
    written: int = 0

    @property
    def sequence(self) -> Sequence | None:
        return self.owner() if self.owner is not None else None


class Scheduler:
    """Requests and slots.

    batch_sizes:  rows of decode steps, ascending; the last is the number of slots.
    prompt_rows:  rows of steps that take prompts, ascending.
    chunk_sizes:  tokens of steps that go on behind others.
    candidates:   how many candidates every program samples from; None where a program may have any number.
    rotations:    how RoPE depends on a prompt's length, None where it does not.
    window:       how many of a sequence's last positions every layer keeps; None for all. A slot that holds more than
                  that can go back by one token; by none where the window is 0, as with recurrent layers.
    budget:       most tokens of a turn, where one row of a prompt does not take more; None for no limit.
    verify_sizes: tokens of steps that verify drafts, ascending.
    """

    def __init__(
        self,
        buckets: Buckets,
        batch_sizes: SequenceOf[int],
        prompt_rows: SequenceOf[int] | None = None,
        chunk_sizes: SequenceOf[int] | None = None,
        candidates: int | None = None,
        rotations: Rotations | None = None,
        window: int | None = None,
        budget: int | None = None,
        verify_sizes: SequenceOf[int] = VERIFY_SIZES,
    ):
        self.buckets, self.batch_sizes, self.prompt_rows = buckets, batch_sizes, prompt_rows or batch_sizes
        sizes = buckets.context if chunk_sizes is None else chunk_sizes
        self._chunk_sizes = [t for t in sizes if 1 < t < buckets.capacity]
        self._verify_sizes = [t for t in verify_sizes if t < buckets.capacity]
        self._candidates, self._rotations, self._window, self.budget = candidates, rotations, window, budget
        self._slots = [_Slot() for _ in range(batch_sizes[-1])]
        self._waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._clock = 0
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self.prefix: list[int] = []
        """Tokens that are kept for sequences that start with them: their slot is taken by others last."""

    def submit(self, sequence: Sequence, *, first: bool = False) -> None:
        """Has a sequence computed, and its tokens drawn; `first`, before all that wait."""
        if sequence.slot is not None:
            self.running.append(sequence)
        elif first:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def pause(self, sequence: Sequence) -> None:
        """Computes no more of a sequence, which keeps its slot until another needs it."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def close(self, sequence: Sequence) -> None:
        """Ends a sequence; its slot is free, and what it holds may serve another."""
        self.pause(sequence)
        self._release(sequence)

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self.running)

    @property
    def free_slots(self) -> int:
        """Slots without an owner."""
        return sum(slot.sequence is None for slot in self._slots)

    def keep_prefix(self, sequence: Sequence | None, *, aside: bool) -> int | None:
        """Keeps the tokens of a computed sequence, or None, for those that start with them, in its slot.

        aside: in a slot behind those that decode, whose number is given: it is to be copied there.
        """
        del self._slots[self.batch_sizes[-1] :]
        self.prefix = [] if sequence is None else list(sequence.tokens)
        if sequence is None or not aside:
            return None
        self._slots.append(_Slot(None, self.prefix, sequence.prompt, written=sequence.written))
        return len(self._slots) - 1

    @property
    def largest(self) -> tuple[int, int]:
        """The most slots and positions of a turn."""
        return max(self.batch_sizes[-1], self.prompt_rows[-1]), self.buckets.capacity

    def sizes(self) -> tuple[int, int] | None:
        """Slots and positions for what waits, where nothing that any slot holds is needed; else None."""
        if not self._waiting or self.prefix or self.free_slots < len(self._slots):
            return None
        if any(self._reusable(sequence, slot) for sequence in self._waiting for slot in self._slots):
            return None
        most = min(len(self._waiting), len(self._slots))
        longest = max(sequence.length for sequence in list(self._waiting)[:most])
        slots = max(fit(self.batch_sizes, most), fit(self.prompt_rows, most))
        return slots, self.buckets.positions(min(longest + 1, self.buckets.capacity))

    def forget(self) -> None:
        """Has no slot hold anything, as after a fault: sequences with slots are computed again."""
        lost = [sequence for slot in self._slots if (sequence := slot.sequence) is not None]
        self._slots = [_Slot() for _ in self._slots]
        for sequence in lost:
            sequence.slot, sequence.computed, sequence.pending = None, 0, 0
        self.preemptions += len(self.running)
        self._waiting.extendleft(reversed(self.running))
        self.running = []

    def plan(self) -> Plan:
        """The next turn; no steps where nothing can go on."""
        self._clock += 1
        copies = self._admit()
        for sequence in self.running:
            if self._is_lost(sequence.computed, sequence.written):
                sequence.computed = 0
        ready = [sequence for sequence in self.running if sequence.remaining > 0]
        stepwise = [sequence for sequence in ready if self._count(sequence) == 1 or self._is_short(sequence)]
        copies += self._compact(stepwise)
        turns = [self._decode(stepwise)] if stepwise else []
        if chunked := [sequence for sequence in ready if sequence not in stepwise]:
            turns.append(self._prefill(chunked, len(stepwise)))
        return Plan(tuple(copies), tuple(turns))

    def upcoming(self, turn: Turn) -> list[ProgramKey]:
        """The programs that will be needed after `turn` for its longest sequence, the first decode step last."""
        row = max(turn.rows, key=lambda row: row.sequence.length)
        sequence, key, keys = row.sequence, turn.step.key, []
        done, length = row.start + row.count, sequence.length
        while length - done > 1 and self._chunk_sizes:
            count = min(length - done, self._chunk_sizes[-1])
            t = fit(self._chunk_sizes, count)
            keys.append(ProgramKey(key.kind, key.rows, t, self._positions(done + count, t), key.candidates))
            done += count
        if (sequence.remaining and sequence.drawing is not None) or length - done == 1:
            rows = fit(self.batch_sizes, max((s.slot or 0) + 1 for s in self.running))
            positions = self.buckets.positions(min(length + 1, self.buckets.capacity))
            keys.append(ProgramKey("decode", rows, 1, positions, key.candidates))
        return keys

    def _admit(self) -> list[tuple[int, int]]:
        """Gives waiting sequences slots, and says what is to be copied there."""
        copies = []
        while self._waiting and (choice := self._choose(self._waiting[0])) is not None:
            sequence = self._waiting.popleft()
            number, source, length = choice
            if source not in (None, number):
                copies.append((source, number))
            if sequence.source is None:
                sequence.cached = length
                self.prefix_queries += len(sequence.tokens)
                self.prefix_hits += length
            self._take(sequence, number, length, self._slots[number if source is None else source])
            self.running.append(sequence)
        return copies

    def _choose(self, sequence: Sequence) -> tuple[int, int | None, int] | None:
        """A slot for a sequence, the slot to copy from (None for nothing) and how many tokens it then holds."""
        reusable = [self._reusable(sequence, slot) for slot in self._slots]
        places = range(self.batch_sizes[-1])
        free = [number for number in places if self._slots[number].sequence is None]
        source = max(range(len(reusable)), key=lambda number: (reusable[number], number in free))
        if reusable[source] and source in free:
            return source, source, reusable[source]
        if not free:
            owners = [owner for slot in self._slots if (owner := slot.sequence) is not None]
            idle = [owner for owner in owners if owner not in self.running]
            if not idle:
                return None
            oldest = min(idle, key=lambda owner: owner.used)
            free = [number for number, slot in enumerate(self._slots) if slot.sequence is oldest]
            self._release(oldest)
            oldest.computed = 0
            reusable[free[0]] = 0
        number = min(free, key=lambda number: (self._keeps_prefix(self._slots[number]), number))
        return number, source if reusable[source] else None, reusable[source]

    def _is_lost(self, count: int, written: int) -> bool:
        """Whether a slot that was written up to `written` holds no longer what follows on `count` tokens."""
        if self._window is None or written <= self._window:
            return False
        return count < written - (1 if self._window else 0)

    def _reusable(self, sequence: Sequence, slot: _Slot) -> int:
        """How many tokens of a sequence may be taken from a slot.

        Of its source or the kept prefix any number; else whole chunks of a prompt, as it would compute them itself.
        None where the slot has lost what would follow on them.
        """
        written = slot.written if slot.sequence is None else slot.sequence.written
        count = self._common(sequence, slot)
        return 0 if self._is_lost(count, written) else count

    def _common(self, sequence: Sequence, slot: _Slot) -> int:
        if sequence.every_logits and sequence.source is None:
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
        prefix = min(len(self.prefix), valid)
        if prefix and sequence.tokens[: len(self.prefix)] == self.prefix and tokens[:prefix] == self.prefix[:prefix]:
            return prefix
        chunk = self.buckets.context[-1]
        return _common(tokens, sequence.tokens, min(valid, prompt, sequence.prompt)) // chunk * chunk

    def _keeps_prefix(self, slot: _Slot) -> bool:
        return bool(self.prefix) and slot.tokens[: len(self.prefix)] == self.prefix

    def _take(self, sequence: Sequence, number: int, computed: int, source: _Slot) -> None:
        written = source.written if source.sequence is None else source.sequence.written
        self._slots[number] = _Slot(weakref.ref(sequence))
        sequence.slot, sequence.computed, sequence.pending, sequence.source = number, computed, 0, None
        sequence.written, sequence.used = written if computed else 0, self._clock

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            valid = min(sequence.computed, len(sequence.tokens))
            self._slots[sequence.slot] = _Slot(
                None, sequence.tokens[:valid], sequence.prompt, weakref.ref(sequence), sequence.written
            )
            sequence.slot = None

    def _compact(self, stepwise: SequenceOf[Sequence]) -> list[tuple[int, int]]:
        """Moves sequences to lower slots where a smaller decode step then takes all."""
        owned = [slot.sequence for slot in self._slots if slot.sequence is not None]
        least = fit(self.batch_sizes, len(owned))
        if not stepwise or fit(self.batch_sizes, 1 + max(s.slot or 0 for s in stepwise)) <= least:
            return []
        moves = []
        free = [number for number in range(least) if self._slots[number].sequence is None]
        for sequence in owned:
            if sequence is not None and sequence.slot is not None and sequence.slot >= least:
                source, target = sequence.slot, free.pop(0)
                self._slots[source], self._slots[target] = _Slot(), self._slots[source]
                sequence.slot = target
                moves.append((source, target))
        return moves

    def _extent(self, sequence: Sequence) -> int:
        """The length of the sequence that the next token is computed in."""
        if self._rotations is None:
            return sequence.length
        at = sequence.computed
        return sequence.extents[at] if at < len(sequence.extents) else at + 1

    def _count(self, sequence: Sequence) -> int:
        """How many tokens the next step takes of a sequence, at most; 1 in a decode step."""
        count = self._extent(sequence) - sequence.computed
        sizes = self._chunk_sizes if sequence.computed else [t for t in self.buckets.context if t > 1]
        return min(count, sizes[-1]) if sizes else 1

    def _positions(self, length: int, tokens: int) -> int:
        """The token bucket of a step of `tokens` tokens that goes on behind others, up to `length`."""
        return next(s for s in self.buckets.tokens if s >= length and s > tokens)

    def _is_short(self, sequence: Sequence) -> bool:
        """Whether a step that verifies drafts gives all logits that are wanted of a sequence."""
        fits = bool(self._verify_sizes) and sequence.remaining <= self._verify_sizes[-1]
        alone = sequence.every_logits and sequence.drawing is None
        return alone and fits and sequence.computed > 0 and self._rotations is None

    def draft_room(self, sequence: Sequence) -> int:
        """The most tokens of a draft that may follow a sequence: what it draws at last has no draft, and a slot that a
        draft is forgotten in has lost nothing."""
        start = sequence.length
        most = min(self._verify_sizes[-1] - 1, sequence.limit - start - 1) if self._verify_sizes else 0
        if self._window is not None:
            most = min(most, self._window - max(start, sequence.written))
        if self._rotations is not None and not self._rotations.same(start, start + most):
            return 0
        return max(most, 0)

    def _decode(self, sequences: SequenceOf[Sequence]) -> Turn:
        """One token of each, and its draft; or all that are left of those whose every logits are wanted."""
        rows = fit(self.batch_sizes, 1 + max(sequence.slot or 0 for sequence in sequences))
        slots = {sequence.slot or 0: sequence for sequence in sequences}
        counts = {
            slot: sequence.remaining if self._is_short(sequence) else 1 + len(sequence.draft)
            for slot, sequence in slots.items()
        }
        end = max(sequence.computed + counts[slot] for slot, sequence in slots.items())
        if (most := max(counts.values())) == 1:
            return self._turn("decode", rows, 1, self.buckets.positions(end), slots, counts)
        t = fit(self._verify_sizes, most)
        return self._turn("verify", rows, t, self._positions(end, t), slots, counts)

    def _prefill(self, sequences: SequenceOf[Sequence], decoding: int) -> Turn:
        """Chunks of prompts that go through one program: like the first, at the beginning or behind other tokens.

        The boundaries of a prompt's chunks are its own, whatever others there are.
        """
        sequences = sorted(sequences, key=self._precedence)
        first = sequences[0]
        alike = [s for s in sequences if (s.computed > 0, s.every_logits) == (first.computed > 0, first.every_logits)]
        sizes = self._chunk_sizes if first.computed else [t for t in self.buckets.context if t > 1]
        chosen = self._within_budget(alike[: self.prompt_rows[-1]], sizes, decoding)
        t = fit(sizes, max(map(self._count, chosen)))
        counts = [min(t, self._count(sequence)) for sequence in chosen]
        ends = [sequence.computed + count for sequence, count in zip(chosen, counts, strict=True)]
        positions = self._positions(max(ends), t) if first.computed else t
        rows = fit(self.prompt_rows, len(chosen))
        kind: Kind = "score" if first.every_logits else "prefill"
        return self._turn(kind, rows, t, positions, dict(enumerate(chosen)), dict(enumerate(counts)))

    def _precedence(self, sequence: Sequence) -> tuple[int, int]:
        """Prompts that others went before for long come first, then those of the fewest remaining tokens."""
        passed_over = self._clock - sequence.used > MOST_PASSED_OVER
        return (0, sequence.used) if passed_over else (1, sequence.remaining)

    def _within_budget(
        self, sequences: SequenceOf[Sequence], sizes: SequenceOf[int], decoding: int
    ) -> SequenceOf[Sequence]:
        """The first of `sequences`, and those after it whose step exceeds neither the budget nor its own. Chunks behind
        others take the fewest rows, so that there are few programs."""
        if self.budget is None:
            return sequences
        if sequences[0].computed:
            return sequences[: self.prompt_rows[0]]
        counts = list(map(self._count, sequences))
        tokens = [fit(self.prompt_rows, n) * fit(sizes, max(counts[:n])) for n in range(1, len(counts) + 1)]
        most = max(self.budget - decoding, tokens[0])
        return sequences[: sum(n <= most for n in tokens)]

    def programs(self, candidates: int, verifies: bool = False) -> list[ProgramKey]:
        """The programs of every turn within the budget that draws from so many candidates, without scores; those that
        verify drafts where `verifies`."""
        least, tokens = self.prompt_rows[0], self.buckets.tokens
        room = max(self.budget or math.inf, least * self.buckets.context[-1])
        whole = [(rows, t, t) for rows in self.prompt_rows for t in self.buckets.context if t > 1 and rows * t <= room]
        behind = [(least, t, s) for t in self._chunk_sizes for s in tokens if s > t]
        decode = [ProgramKey("decode", rows, 1, s, candidates) for rows in self.batch_sizes for s in tokens]
        sizes = [(rows, t, s) for rows in self.batch_sizes for t in self._verify_sizes for s in tokens if t < s]
        verify = [ProgramKey("verify", *size, candidates) for size in sizes if verifies]
        return decode + verify + [ProgramKey("prefill", *sizes, candidates) for sizes in (*whole, *behind)]

    def _turn(
        self, kind: Kind, rows: int, t: int, positions: int, sequences: dict[int, Sequence], counts: dict[int, int]
    ) -> Turn:
        """A step of sequences by row, which count as computed from now on."""
        wanted = [s.drawing.candidates for s in sequences.values() if s.drawing is not None]
        key = ProgramKey(kind, rows, t, positions, self._candidates or max(wanted, default=1))
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in key.inputs().items()}
        for name in ("temperature_b", "top_k_b", "top_p_b"):
            if name in arrays:
                arrays[name][:] = 1
        if "slot_b" in arrays:
            taken = {sequence.slot for sequence in sequences.values()}
            others = iter([number for number in range(len(self._slots)) if number not in taken])
            slot_b = [sequences[i].slot if i in sequences else next(others) for i in range(rows)]
            arrays["slot_b"][:] = np.array(slot_b, np.int32)
        turn_rows = []
        for index, sequence in sequences.items():
            start, count = sequence.computed, counts[index]
            known = sequence.tokens[start : start + count]
            unknown = [DRAWN_LAST] * (count - len(known) - len(sequence.draft))
            arrays["tokens_bt"][index, :count] = known + unknown + sequence.draft
            arrays["start_b"][index] = start
            arrays["length_b"][index] = count if kind == "verify" else self._extent(sequence) - start
            last = start + count >= sequence.length
            if sequence.drawing is not None and "temperature_b" in arrays:
                drawing = sequence.drawing
                arrays["temperature_b"][index], arrays["top_k_b"][index] = drawing.temperature, drawing.top_k
                arrays["top_p_b"][index] = drawing.top_p
                first = sequence.length - sequence.prompt
                uniform = [drawing.uniform(first + n) for n in range(1 + len(sequence.draft))]
                numbers = arrays["uniform_bt" if kind == "verify" else "uniform_b"]
                numbers.reshape(rows, -1)[index, : len(uniform)] = uniform
            turn_rows.append(Row(index, sequence, start, count, last))
            sequence.computed, sequence.used = start + count, self._clock
            sequence.written = max(sequence.written if start else 0, sequence.computed)
            if last and sequence.drawing is not None:
                sequence.pending += 1
        return Turn(StepInput(key, arrays), tuple(turn_rows))

    def take(self, sequence: Sequence, token: int) -> None:
        """The token that a step drew for a sequence, or that the host chose for it."""
        if sequence.drawing is not None:
            sequence.pending -= 1
        sequence.tokens.append(token)


def _common(a: SequenceOf[int], b: SequenceOf[int], most: int) -> int:
    """How many tokens two sequences have in common from their beginning, up to `most`."""
    if a[:most] == b[:most]:
        return most
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
