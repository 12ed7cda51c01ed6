"""Schedules sequences into slots and steps: pure Python over plain data, without JAX.

A slot of the state table holds the first `computed` tokens of its sequence. The scheduler assigns slots to waiting
sequences, plans one turn of steps at a time, and takes the tokens that the steps drew. A turn can be planned before the
tokens of the turn before it are read: a decode step may take "the token that this slot drew last".
"""

import weakref
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jx_neuron.engine.rotations import Rotations
from jx_neuron.step.buckets import Buckets, fit
from jx_neuron.step.program_key import Kind, ProgramKey
from jx_neuron.step.step_input import DRAWN_LAST, StepInput


class Drawing(Protocol):
    """Sampling parameters of a sequence that programs draw from, as in `jx_neuron.nn.sampling.Sampling`."""

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


@dataclass(eq=False)
class Sequence:
    """A sequence of tokens, and how far it is computed.

    tokens:       the known tokens: given, or drawn and read.
    prompt:       the number of tokens given at first.
    limit:        the most tokens that drawing may reach; at most `prompt` where none is drawn.
    drawing:      sampling parameters of programs; None where the host chooses tokens, or nothing is drawn.
    every_logits: whether the logits of every token are needed, not only of the last.
    source:       a sequence that begins with the same tokens, to copy state from.
    extents:      of each given token, the length of the sequence in which it was computed; RoPE may depend on it.
    computed:     the number of tokens in the slot once the steps in flight have run.
    pending:      the number of tokens that were drawn and not read yet.
    sink:         the receiver of outputs: a `Sink` of jx_neuron.engine.engine.
    """

    tokens: list[int]
    limit: int = 0
    drawing: Drawing | None = None
    every_logits: bool = False
    source: "Sequence | None" = None
    extents: list[int] = field(default_factory=list)
    prompt: int = 0
    sink: Any = None
    slot: int | None = None
    computed: int = 0
    pending: int = 0
    used: int = 0

    def __post_init__(self) -> None:
        self.prompt = self.prompt or len(self.tokens)
        self.extents = self.extents or [self.prompt] * self.prompt

    @property
    def length(self) -> int:
        """The number of tokens, with those not read yet."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """The number of tokens to compute; 0 where drawing has reached `limit`."""
        full = self.drawing is not None and self.length >= self.limit
        return 0 if full else self.length - self.computed

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends given tokens."""
        self.tokens.extend(tokens)
        self.extents += [len(self.tokens)] * (len(self.tokens) - len(self.extents))

    def fork(self) -> "Sequence":
        """A sequence that begins with the same tokens; their state is copied where possible."""
        return Sequence(list(self.tokens), extents=list(self.extents), prompt=self.prompt, source=self, sink=self.sink)

    def crop(self, length: int) -> None:
        """Removes the tokens from `length` on."""
        del self.tokens[length:], self.extents[length:]
        self.computed, self.prompt = min(self.computed, length), min(self.prompt, length)


@dataclass(frozen=True)
class Row:
    """One row of a step: `count` tokens of a sequence from `start` on; `last` where these reach its end."""

    index: int
    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Turn:
    """One step and its rows."""

    step: StepInput
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """The next turn: copies (source slot, target slot) in order, then steps in order."""

    copies: tuple[tuple[int, int], ...]
    turns: tuple[Turn, ...]


@dataclass
class _Slot:
    """A slot: its owner or, without one, the tokens that it holds and their former owner."""

    owner: "weakref.ref[Sequence] | None" = None
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    former: "weakref.ref[Sequence] | None" = None

    @property
    def sequence(self) -> Sequence | None:
        return self.owner() if self.owner is not None else None


class Scheduler:
    """Assigns slots to sequences, and plans turns.

    batch_sizes:  rows of decode steps, ascending; the last is the number of slots.
    prompt_rows:  rows of prefill steps, ascending.
    chunk_sizes:  tokens of prefill steps that start after position 0.
    candidates:   the number of candidates that every program samples from; None where it may be any.
    rotations:    the dependence of RoPE on a prompt's length; None where there is none.
    budget:       the most tokens of a turn, unless a single row of a prompt has more; None for no limit.
    """

    def __init__(
        self,
        buckets: Buckets,
        batch_sizes: SequenceOf[int],
        prompt_rows: SequenceOf[int] | None = None,
        chunk_sizes: SequenceOf[int] | None = None,
        candidates: int | None = None,
        rotations: Rotations | None = None,
        budget: int | None = None,
    ):
        self.buckets, self.batch_sizes, self.prompt_rows = buckets, batch_sizes, prompt_rows or batch_sizes
        sizes = buckets.context if chunk_sizes is None else chunk_sizes
        self._chunk_sizes = [t for t in sizes if 1 < t < buckets.capacity]
        self._candidates, self._rotations, self._budget = candidates, rotations, budget
        self._slots = [_Slot() for _ in range(batch_sizes[-1])]
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._clock = 0
        self.prefix: list[int] = []
        """A kept prefix: its tokens serve the sequences that start with them, and its slot is reused last."""

    def submit(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queues a sequence, with `first` before all others."""
        if sequence.slot is not None:
            self._running.append(sequence)
        elif first:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def pause(self, sequence: Sequence) -> None:
        """Pauses a sequence. It keeps its slot until another needs that."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def close(self, sequence: Sequence) -> None:
        """Ends a sequence and frees its slot, whose state another sequence may reuse."""
        self.pause(sequence)
        self._release(sequence)

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def free_slots(self) -> int:
        """The number of slots without an owner."""
        return sum(slot.sequence is None for slot in self._slots)

    def keep_prefix(self, sequence: Sequence | None, *, aside: bool) -> int | None:
        """Keeps a computed sequence's tokens in its slot as the prefix; None drops the kept prefix.

        aside: keeps them in a slot after those of decode steps instead. Returns its number; the caller copies the state
               there.
        """
        del self._slots[self.batch_sizes[-1] :]
        self.prefix = [] if sequence is None else list(sequence.tokens)
        if sequence is None or not aside:
            return None
        self._slots.append(_Slot(None, self.prefix, sequence.prompt))
        return len(self._slots) - 1

    def sizes(self) -> tuple[int, int] | None:
        """Slots and positions that the waiting sequences need; None where any slot's state is still needed."""
        if not self._waiting or self.prefix or self.free_slots < len(self._slots):
            return None
        if any(self._reusable(sequence, slot) for sequence in self._waiting for slot in self._slots):
            return None
        most = min(len(self._waiting), len(self._slots))
        longest = max(sequence.length for sequence in list(self._waiting)[:most])
        slots = max(fit(self.batch_sizes, most), fit(self.prompt_rows, most))
        return slots, self.buckets.positions(min(longest + 1, self.buckets.capacity))

    def forget(self) -> None:
        """Empties every slot, as after a fault. Sequences with slots are computed again."""
        lost = [sequence for slot in self._slots if (sequence := slot.sequence) is not None]
        self._slots = [_Slot() for _ in self._slots]
        for sequence in lost:
            sequence.slot, sequence.computed, sequence.pending = None, 0, 0
        self._waiting.extendleft(reversed(self._running))
        self._running = []

    def plan(self) -> Plan:
        """Plans the next turn; it has no steps where no sequence can run."""
        self._clock += 1
        copies = self._admit()
        ready = [sequence for sequence in self._running if sequence.remaining > 0]
        stepwise = [sequence for sequence in ready if self._count(sequence) == 1]
        copies += self._compact(stepwise)
        turns = [self._decode(stepwise)] if stepwise else []
        if chunked := [sequence for sequence in ready if self._count(sequence) > 1]:
            turns.append(self._prefill(chunked, len(stepwise)))
        return Plan(tuple(copies), tuple(turns))

    def upcoming(self, turn: Turn) -> list[ProgramKey]:
        """The programs that the longest sequence of `turn` needs next, up to its first decode step."""
        row = max(turn.rows, key=lambda row: row.sequence.length)
        sequence, key, keys = row.sequence, turn.step.key, []
        computed, length = row.start + row.count, sequence.length
        while length - computed > 1 and self._chunk_sizes:
            count = min(length - computed, self._chunk_sizes[-1])
            t = fit(self._chunk_sizes, count)
            keys.append(ProgramKey(key.kind, key.rows, t, self._positions(computed + count, t), key.candidates))
            computed += count
        if (sequence.remaining and sequence.drawing is not None) or length - computed == 1:
            rows = fit(self.batch_sizes, max((s.slot or 0) + 1 for s in self._running))
            positions = self.buckets.positions(min(length + 1, self.buckets.capacity))
            keys.append(ProgramKey("decode", rows, 1, positions, key.candidates))
        return keys

    def _admit(self) -> list[tuple[int, int]]:
        """Assigns slots to waiting sequences. Returns the copies (source slot, target slot) to make."""
        copies = []
        while self._waiting and (choice := self._choose(self._waiting[0])) is not None:
            sequence = self._waiting.popleft()
            number, source, length = choice
            if source not in (None, number):
                copies.append((source, number))
            self._take(sequence, number, length)
            self._running.append(sequence)
        return copies

    def _choose(self, sequence: Sequence) -> tuple[int, int | None, int] | None:
        """A slot for a sequence, the slot to copy from (None for no copy), and the number of tokens it then holds."""
        reusable = [self._reusable(sequence, slot) for slot in self._slots]
        places = range(self.batch_sizes[-1])
        free = [number for number in places if self._slots[number].sequence is None]
        source = max(range(len(reusable)), key=lambda number: (reusable[number], number in free))
        if reusable[source] and source in free:
            return source, source, reusable[source]
        if not free:
            owners = [owner for slot in self._slots if (owner := slot.sequence) is not None]
            idle = [owner for owner in owners if owner not in self._running]
            if not idle:
                return None
            oldest = min(idle, key=lambda owner: owner.used)
            free = [number for number, slot in enumerate(self._slots) if slot.sequence is oldest]
            self._release(oldest)
            oldest.computed = 0
            reusable[free[0]] = 0
        number = min(free, key=lambda number: (self._keeps_prefix(self._slots[number]), number))
        return number, source if reusable[source] else None, reusable[source]

    def _reusable(self, sequence: Sequence, slot: _Slot) -> int:
        """The number of tokens of a sequence whose state in a slot can be reused.

        Any number from its source or the kept prefix; from other slots whole chunks of a prompt, so that the numbers
        are those that it would compute itself.
        """
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

    def _take(self, sequence: Sequence, number: int, computed: int) -> None:
        self._slots[number] = _Slot(weakref.ref(sequence))
        sequence.slot, sequence.computed, sequence.pending, sequence.source = number, computed, 0, None

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            valid = min(sequence.computed, len(sequence.tokens))
            self._slots[sequence.slot] = _Slot(None, sequence.tokens[:valid], sequence.prompt, weakref.ref(sequence))
            sequence.slot = None

    def _compact(self, stepwise: SequenceOf[Sequence]) -> list[tuple[int, int]]:
        """Moves sequences to lower slots where all then fit a smaller decode step. Returns the copies to make."""
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
        """The length of the sequence in which the next token is computed."""
        if self._rotations is None:
            return sequence.length
        at = sequence.computed
        return sequence.extents[at] if at < len(sequence.extents) else at + 1

    def _count(self, sequence: Sequence) -> int:
        """The most tokens of a sequence that its next step takes; 1 in a decode step."""
        count = self._extent(sequence) - sequence.computed
        sizes = self._chunk_sizes if sequence.computed else [t for t in self.buckets.context if t > 1]
        return min(count, sizes[-1]) if sizes else 1

    def _positions(self, length: int, tokens: int) -> int:
        """The token bucket of a step of `tokens` tokens that start after position 0, up to `length`."""
        return next(s for s in self.buckets.tokens if s >= length and s > tokens)

    def _decode(self, sequences: SequenceOf[Sequence]) -> Turn:
        """A decode step: one token of each sequence."""
        rows = fit(self.batch_sizes, 1 + max(sequence.slot or 0 for sequence in sequences))
        positions = self.buckets.positions(1 + max(sequence.computed for sequence in sequences))
        slots = {sequence.slot or 0: sequence for sequence in sequences}
        return self._turn("decode", rows, 1, positions, slots, dict.fromkeys(slots, 1))

    def _prefill(self, sequences: SequenceOf[Sequence], decoding: int) -> Turn:
        """A prefill step: chunks of prompts that fit one program, all from position 0 or all from later ones."""
        first = sequences[0]
        alike = [s for s in sequences if (s.computed > 0, s.every_logits) == (first.computed > 0, first.every_logits)]
        chosen = alike[: self.prompt_rows[-1]]
        sizes = self._chunk_sizes if first.computed else [t for t in self.buckets.context if t > 1]
        t = fit(sizes, max(map(self._count, chosen)))
        if self._budget is not None:
            chosen = chosen[: max(1, (self._budget - decoding) // t)]
            t = fit(sizes, max(map(self._count, chosen)))
        counts = [min(t, self._count(sequence)) for sequence in chosen]
        ends = [sequence.computed + count for sequence, count in zip(chosen, counts, strict=True)]
        positions = self._positions(max(ends), t) if first.computed else t
        rows = fit(self.prompt_rows, len(chosen))
        kind: Kind = "score" if first.every_logits else "prefill"
        return self._turn(kind, rows, t, positions, dict(enumerate(chosen)), dict(enumerate(counts)))

    def _turn(
        self, kind: Kind, rows: int, t: int, positions: int, sequences: dict[int, Sequence], counts: dict[int, int]
    ) -> Turn:
        """A step of `sequences`, by row; their tokens count as computed from now on."""
        candidates = [s.drawing.candidates for s in sequences.values() if s.drawing is not None]
        key = ProgramKey(kind, rows, t, positions, self._candidates or max(candidates, default=1))
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in key.inputs().items()}
        for name in ("temperature_b", "top_k_b", "top_p_b"):
            if name in arrays:
                arrays[name][:] = 1
        if "slot_b" in arrays:
            occupied = {sequence.slot for sequence in sequences.values()}
            idle = iter([number for number in range(len(self._slots)) if number not in occupied])
            slot_b = [sequences[i].slot if i in sequences else next(idle) for i in range(rows)]
            arrays["slot_b"][:] = np.array(slot_b, np.int32)
        turn_rows = []
        for index, sequence in sequences.items():
            start, count = sequence.computed, counts[index]
            tokens = sequence.tokens[start : start + count]
            arrays["tokens_bt"][index, :count] = tokens + [DRAWN_LAST] * (count - len(tokens))
            arrays["start_b"][index], arrays["length_b"][index] = start, self._extent(sequence) - start
            last = start + count == sequence.length
            if sequence.drawing is not None and "uniform_b" in arrays:
                drawing = sequence.drawing
                arrays["temperature_b"][index], arrays["top_k_b"][index] = drawing.temperature, drawing.top_k
                arrays["top_p_b"][index] = drawing.top_p
                arrays["uniform_b"][index] = drawing.uniform(sequence.length - sequence.prompt)
            turn_rows.append(Row(index, sequence, start, count, last))
            sequence.computed, sequence.used = start + count, self._clock
            if last and sequence.drawing is not None:
                sequence.pending += 1
        return Turn(StepInput(key, arrays), tuple(turn_rows))

    def take(self, sequence: Sequence, token: int) -> None:
        """Appends the token that a step drew, or that the host chose, to a sequence."""
        if sequence.drawing is not None:
            sequence.pending -= 1
        sequence.tokens.append(token)


def _common(a: SequenceOf[int], b: SequenceOf[int], most: int) -> int:
    """The length of the common prefix of two sequences, up to `most`."""
    if a[:most] == b[:most]:
        return most
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
