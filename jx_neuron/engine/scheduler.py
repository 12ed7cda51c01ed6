"""Which sequences go through the next step, and in which slots: pure Python over plain data, without JAX.

The scheduler gives waiting sequences slots, makes a turn of steps at a time, and takes the tokens that were drawn. A
turn may be planned before the tokens of the one before it are known: a decode step takes "the token that this slot drew
last".
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from jx_neuron.engine.drafting import Drafter, taps_of
from jx_neuron.engine.readiness import Readiness
from jx_neuron.engine.rotations import Rotations
from jx_neuron.engine.sequence import Plan, Row, Sequence, Turn
from jx_neuron.engine.slots import Copy, Slots
from jx_neuron.step.buckets import Buckets, fit
from jx_neuron.step.program_key import Kind, ProgramKey
from jx_neuron.step.step_input import DRAWN_LAST, StepInput, StepRow

VERIFY_SIZES = (2, 4, 8)
"""Tokens of steps that verify drafts, where programs are compiled on demand. On a CPU, more tokens take longer each
(docs/speculation.md)."""

MOST_PASSED_OVER = 3
"""Turns that a prompt waits at most while others, of fewer remaining tokens, go before it; then it is next."""


class Scheduler:
    """Requests and slots.

    batch_sizes:  rows of decode steps, ascending; the last is the number of slots.
    prompt_rows:  rows of steps that take prompts, ascending.
    chunk_sizes:  tokens of steps that go on behind others.
    candidates:   how many candidates every program samples from; None where a program may have any number.
    rotations:    how RoPE depends on a prompt's length, None where it does not.
    window:       how many of a sequence's last positions every layer keeps; None for all. A slot that holds more than
                  that can go back by one token; by none where the window is 0, as with recurrent layers.
    budget:       most tokens of prompts in a turn, where one row does not take more; None for no limit. Within a
                  budget, chunks behind others take the fewest rows.
    verify_sizes: tokens of steps that verify drafts, ascending.
    adapters:     whether the model has adapters, and steps the number of each row's.
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
        adapters: bool = False,
    ):
        self.buckets, self.batch_sizes, self.prompt_rows = buckets, batch_sizes, prompt_rows or batch_sizes
        sizes = buckets.context if chunk_sizes is None else chunk_sizes
        self._whole_sizes = [t for t in buckets.context if t > 1]
        self._chunk_sizes = [t for t in sizes if 1 < t < buckets.capacity]
        self._verify_sizes = [t for t in verify_sizes if t < buckets.capacity]
        self._candidates, self._rotations, self._window, self.budget = candidates, rotations, window, budget
        self._adapters = adapters
        self.slots = Slots(batch_sizes[-1], buckets.context[-1], rotations, window)
        self._waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._clock = 0
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self._readiness: Readiness | None = None

    def reserve(
        self, budget: int, candidates: int, loaded: Callable[[ProgramKey], bool], drafter: Drafter | None = None
    ) -> Readiness:
        """Plans for callers that come and go, from now on: turns within a budget, of programs that are `loaded`.

        All draw from `candidates` tokens. Of a prompt, any number of tokens is taken from a slot, of its smallest chunk
        at least: a slot's owner may be another caller, whose chunks have other boundaries, and who drew some of them.
        Drafts are verified where there is a `drafter`.

        Returns the programs to load.
        """
        self.budget, self._candidates = budget, candidates
        self.slots.take_any(self._whole_sizes[0] if self._whole_sizes else 1)
        if drafter is None:
            self._verify_sizes = []
        sizes = self._chunk_sizes, self._verify_sizes
        self._readiness = Readiness.of(
            self.buckets, self.batch_sizes, self.prompt_rows, *sizes, budget, candidates, loaded, taps_of([drafter])
        )
        return self._readiness

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
        """Ends a sequence; its slot is free, and the tokens in it may serve another."""
        self.pause(sequence)
        self.slots.release(sequence)

    @property
    def is_recurrent(self) -> bool:
        """Whether slots keep one state of a sequence, and no earlier one."""
        return self._window == 0

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self.running)

    @property
    def largest(self) -> tuple[int, int]:
        """The most slots and positions of a turn."""
        return max(self.batch_sizes[-1], self.prompt_rows[-1]), self.buckets.capacity

    def sizes(self) -> tuple[int, int] | None:
        """Slots and positions for what waits, where nothing that any slot holds is needed; else None."""
        slots = self.slots
        if not self._waiting or slots.prefix or slots.free < len(slots):
            return None
        if any(slots.reusable(sequence, slot) for sequence in self._waiting for slot in slots):
            return None
        most = min(len(self._waiting), len(slots))
        longest = max(sequence.length for sequence in list(self._waiting)[:most])
        rows = max(fit(self.batch_sizes, most), fit(self.prompt_rows, most))
        return rows, self.buckets.positions(min(longest + 1, self.buckets.capacity))

    def forget(self) -> None:
        """Has no slot hold anything, as after a fault: sequences with slots are computed again."""
        self.slots.forget()
        self.preemptions += len(self.running)
        self._waiting.extendleft(reversed(self.running))
        self.running = []

    def plan(self) -> Plan:
        """The next turn; no steps where nothing can go on."""
        self._clock += 1
        copies = self._admit()
        for sequence in self.running:
            if not sequence.again and self.slots.is_lost(sequence.computed, sequence.written):
                sequence.computed = 0
        ready = [sequence for sequence in self.running if sequence.remaining > 0]
        stepwise = [sequence for sequence in ready if self._count(sequence) == 1 or self._is_short(sequence)]
        copies += self.slots.compact(stepwise, self.batch_sizes)
        turns = [self._decode(stepwise)] if stepwise else []
        if chunked := [sequence for sequence in ready if sequence not in stepwise]:
            turns.append(self._prefill(chunked))
        return Plan(tuple(copies), tuple(turns))

    def upcoming(self, turn: Turn) -> list[ProgramKey]:
        """The programs that will be needed after `turn` for its longest sequence, the first decode step last."""
        row = max(turn.rows, key=lambda row: row.sequence.length)
        sequence, key, keys = row.sequence, turn.step.key, []
        done, length = row.start + row.count, sequence.length
        while length - done > 1 and self._chunk_sizes:
            count = min(length - done, self._chunk_sizes[-1])
            t = fit(self._chunk_sizes, count)
            keys.append(replace(key, tokens=t, positions=self.buckets.positions(done + count, t)))
            done += count
        if (sequence.remaining and sequence.drawing is not None) or length - done == 1:
            rows = fit(self.batch_sizes, max((s.slot or 0) + 1 for s in self.running))
            positions = self.buckets.positions(min(length + 1, self.buckets.capacity))
            keys.append(ProgramKey("decode", rows, 1, positions, key.candidates, key.taps))
        return keys

    def _admit(self) -> list[Copy]:
        """Gives waiting sequences slots, and returns the copies to make there."""
        copies = []
        while self._waiting:
            sequence = self._waiting[0]
            fresh = sequence.source is None
            if (admitted := self.slots.admit(sequence, self.running, self._clock)) is None:
                break
            copied, held = admitted
            copies += copied
            if fresh:
                sequence.cached = held
                self.prefix_queries += len(sequence.tokens)
                self.prefix_hits += held
            self.running.append(self._waiting.popleft())
        return copies

    def _extent(self, sequence: Sequence) -> int:
        """The length of the sequence that the next token is computed in."""
        if self._rotations is None:
            return sequence.length
        at = sequence.computed
        return sequence.extents[at] if at < len(sequence.extents) else at + 1

    def _count(self, sequence: Sequence) -> int:
        """How many tokens the next step takes of a sequence, at most; 1 in a decode step."""
        count = self._extent(sequence) - sequence.computed
        sizes = self._chunk_sizes if sequence.computed else self._whole_sizes
        return min(count, sizes[-1]) if sizes else 1

    def _is_short(self, sequence: Sequence) -> bool:
        """Whether a step that verifies drafts takes all that remains of a sequence: what an earlier one is to compute
        again, or tokens of which all logits are wanted."""
        if sequence.again:
            return True
        fits = bool(self._verify_sizes) and sequence.remaining <= self._verify_sizes[-1]
        alone = sequence.every_logits and sequence.drawing is None
        return alone and fits and sequence.computed > 0 and self._rotations is None

    def draft_room(self, sequence: Sequence) -> int:
        """The most tokens of a draft that may follow a sequence: what it draws at last has no draft, and a slot that a
        draft is forgotten in has lost nothing."""
        start = sequence.length
        most = self._verify_sizes[-1] - sequence.remaining if self._verify_sizes else 0
        most = min(most, sequence.limit - start - 1)
        if self._window:
            most = min(most, self._window - max(start, sequence.written))
        if self._rotations is not None and not self._rotations.same(start, start + most):
            return 0
        return max(most, 0)

    def _decode(self, sequences: SequenceOf[Sequence]) -> Turn:
        """One token of each, and its draft; or all that are left of those whose every logits are wanted."""
        rows = fit(self.batch_sizes, 1 + max(sequence.slot or 0 for sequence in sequences))
        slots = {sequence.slot or 0: sequence for sequence in sequences}
        counts = {
            slot: (sequence.remaining if self._is_short(sequence) else 1) + len(sequence.draft)
            for slot, sequence in slots.items()
        }
        end, most = max(s.computed + counts[slot] for slot, s in slots.items()), max(counts.values())
        if most == 1 and not any(sequence.again for sequence in sequences):
            wanted = self._key("decode", rows, 1, self.buckets.positions(end), sequences)
        else:
            t = fit(self._verify_sizes, most)
            wanted = self._key("verify", rows, t, self.buckets.positions(end, t), sequences)
        return self._turn(self._fitting(wanted, behind=True) or wanted, slots, counts)

    def _prefill(self, sequences: SequenceOf[Sequence]) -> Turn:
        """Chunks of prompts that one program computes: like the first, at the beginning or behind other tokens.

        The boundaries of a prompt's chunks are its own, whatever others there are.
        """
        sequences = sorted(sequences, key=self._precedence)
        first = sequences[0]
        behind = first.computed > 0
        kind: Kind = "score" if first.every_logits else "prefill"
        alike = [s for s in sequences if (s.computed > 0, s.every_logits) == (behind, first.every_logits)]
        sizes = self._chunk_sizes if behind else self._whole_sizes
        for n in range(min(len(alike), self.prompt_rows[0 if behind and self.budget else -1]), 0, -1):
            counts = list(map(self._count, alike[:n]))
            t, rows = fit(sizes, max(counts)), fit(self.prompt_rows, n)
            end = max(sequence.computed + count for sequence, count in zip(alike, counts, strict=False))
            wanted = self._key(kind, rows, t, self.buckets.positions(end, t) if behind else t, alike[:n])
            key = self._fitting(wanted, behind=behind)
            if n == 1 or (key is not None and (self.budget is None or rows * t <= self.budget)):
                break
        return self._turn(key or wanted, dict(enumerate(alike[:n])), dict(enumerate(counts)))

    def _precedence(self, sequence: Sequence) -> tuple[int, int]:
        """Prompts that others went before for long come first, then those of the fewest remaining tokens."""
        passed_over = self._clock - sequence.used > MOST_PASSED_OVER
        return (0, sequence.used) if passed_over else (1, sequence.remaining)

    def _key(self, kind: Kind, rows: int, tokens: int, positions: int, sequences: SequenceOf[Sequence]) -> ProgramKey:
        """The smallest program for a step of `sequences`."""
        candidates = [s.drawing.candidates for s in sequences if s.drawing is not None]
        taps = taps_of(s.speculation.drafter for s in sequences if s.speculation is not None)
        return ProgramKey(kind, rows, tokens, positions, self._candidates or max(candidates, default=1), taps)

    def _fitting(self, wanted: ProgramKey, *, behind: bool) -> ProgramKey | None:
        return wanted if self._readiness is None else self._readiness.fitting(wanted, behind=behind)

    def _turn(self, key: ProgramKey, sequences: dict[int, Sequence], counts: dict[int, int]) -> Turn:
        """A step of sequences by row, which count as computed from now on."""
        rows, turn_rows = [], []
        for index, sequence in sequences.items():
            start, count = sequence.computed, counts[index]
            known = sequence.tokens[start : start + count]
            tokens = [*known, *[DRAWN_LAST] * (count - len(known) - len(sequence.draft)), *sequence.draft]
            at = -1 - start if sequence.again else start
            length = count if key.kind == "verify" else self._extent(sequence) - start
            first, drawn = sequence.length - sequence.prompt, 1 + len(sequence.draft)
            rows.append(
                StepRow(sequence.slot or 0, tokens, at, length, sequence.drawing, first, drawn, sequence.adapter)
            )
            last = start + count >= sequence.length
            turn_rows.append(Row(index, sequence, start, count, last))
            sequence.computed, sequence.used = start + count, self._clock
            sequence.written = max(sequence.written if start and not sequence.again else 0, sequence.computed)
            sequence.again = False
            if last and sequence.drawing is not None:
                sequence.pending += 1
        return Turn(StepInput.of(key, rows, len(self.slots), self._adapters), tuple(turn_rows))

    def take(self, sequence: Sequence, token: int) -> None:
        """The token that a step drew for a sequence, or that the host chose for it."""
        if sequence.drawing is not None:
            sequence.pending -= 1
        sequence.tokens.append(token)
