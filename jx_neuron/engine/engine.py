"""The engine: runs the sequences of all callers on one runtime, a turn at a time."""

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.engine import speculation
from jx_neuron.engine.collector import Collector
from jx_neuron.engine.drafting import Drafter, FeatureDrafter
from jx_neuron.engine.options import Choice
from jx_neuron.engine.rotations import Rotations
from jx_neuron.engine.scheduler import VERIFY_SIZES, Scheduler
from jx_neuron.engine.sequence import Sequence, Turn
from jx_neuron.engine.ticket import Ticket
from jx_neuron.errors import NonFiniteError
from jx_neuron.runtime.base import Runtime
from jx_neuron.step.buckets import powers_of_two
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepOutput


class _InFlight(NamedTuple):
    turn: Turn
    output: StepOutput

    @property
    def chooses(self) -> bool:
        """Whether the next turn needs what the host makes of this one: a token that it chooses, or a draft."""
        if self.turn.step.key.kind == "verify":
            return True
        return any(
            row.last and (row.sequence.sink.on_host or speculation.is_due(row.sequence)) for row in self.turn.rows
        )


@dataclass
class Engine:
    """Takes requests and yields events. A thread that waits for an event steps the engine.

    Threads share an engine: the one that holds `lock` steps it for all.

    first_not_finite: returns the name of the first tensor with a NaN or an infinity; None where there is none.
    """

    runtime: Runtime
    scheduler: Scheduler
    vocab_size: int
    first_not_finite: Callable[[], str | None] = lambda: None
    lock: RLock = field(default_factory=RLock)
    reserved: bool = False
    closing: deque[Sequence] = field(default_factory=deque)  # any thread may append, without the lock
    _in_flight: list[_InFlight] = field(default_factory=list)

    @classmethod
    def of_model(cls, runtime: Runtime, settings: Settings, first_not_finite: Callable[[], str | None]) -> "Engine":
        """The engine of a model with `settings`. Where `runtime` compiles on demand, prompts are computed in chunks of
        any context bucket, and a power of two at a time unless settings have several batch sizes or a prompt batch;
        rows sample from any number of candidates."""
        on_demand, buckets = runtime.programs is None, settings.buckets
        prompt_rows: SequenceOf[int] | None = [settings.prompt_batch] if settings.prompt_batch else None
        if on_demand and prompt_rows is None and len(settings.batch_sizes) == 1:
            prompt_rows = powers_of_two(settings.slots)
        scheduler = Scheduler(
            buckets,
            settings.batch_sizes,
            prompt_rows,
            None if on_demand else buckets.context[-1:],
            candidates=None if on_demand else settings.candidates,
            rotations=None if settings.rotations is None else Rotations(*settings.rotations),
            window=settings.window,
            verify_sizes=VERIFY_SIZES if on_demand else settings.speculation,
            adapters=settings.adapters is not None,
        )
        return cls(runtime, scheduler, settings.vocab_size, first_not_finite)

    def submit(
        self,
        prompt: SequenceOf[int],
        choices: SequenceOf[Choice],
        row: int = 0,
        tokenizer: Any = None,
        prompt_logprobs: int | None = None,
        drafter: Drafter | None = None,
        adapter: int = 0,
    ) -> list[Ticket]:
        """Submits a prompt, for one answer by each of `choices`; the prompt is computed once.

        row:             index of the first answer, for errors.
        tokenizer:       needed where a choice has stop strings.
        prompt_logprobs: how many of the most likely tokens the first ticket has at each position of the prompt, with
                         their log-probabilities; None for no log-probabilities of the prompt.
        drafter:         guesses what follows; None for no drafts.
        adapter:         the number of the answers' adapter; 0 for none.
        """
        tokens = [int(token) for token in prompt]
        tickets = [
            Ticket(self, tokens, choice, row + number, tokenizer, drafter, adapter)
            for number, choice in enumerate(choices)
        ]
        if prompt_logprobs is not None:
            tickets[0].score_prompt(prompt_logprobs)
        tickets[0].siblings = tickets[1:]
        if tickets[1:]:
            tickets[0].sequence.drawing = None  # the host chooses the first token of each answer
        with self.lock:
            self.scheduler.submit(tickets[0].sequence)
        return tickets

    def step(self) -> None:
        """Dispatches a turn, then reads the one before; reads it first where the host chooses one of its tokens.

        Within a budget, a turn that takes prompts is read at once: one that arrives meanwhile may go before them.
        """
        with self.lock:
            try:
                while self.closing:
                    self._close(self.closing.popleft())
                previous, self._in_flight = self._in_flight, []
                if any(under_way.chooses for under_way in previous):
                    self._read(previous)
                    previous = []
                if self._dispatch():
                    self._read(previous)
                    if any(map(self._yields, self._in_flight)):
                        under_way, self._in_flight = self._in_flight, []
                        self._read(under_way)
            except BaseException:
                self._discard_state()
                raise

    def _yields(self, under_way: _InFlight) -> bool:
        return self.scheduler.budget is not None and not under_way.turn.step.key.in_place

    def _dispatch(self) -> bool:
        """Dispatches the next turn. Where it fails, its requests fail, and False is returned."""
        if self.runtime.programs is None and not self.reserved and (sizes := self.scheduler.sizes()) is not None:
            self.runtime.reset(*sizes)
            self.scheduler.forget()
        speculation.propose(self)
        plan = self.scheduler.plan()
        for source, target in plan.copies:
            self.runtime.copy(np.array([source], np.int32), np.array([target], np.int32))
        for turn in plan.turns:
            try:
                if not turn.step.key.in_place and not self.reserved:
                    self.runtime.load([turn.step.key, *self.scheduler.upcoming(turn)])
                output = self.runtime.run(turn.step)
                if any(row.sequence.sink.wants_logits(row) for row in turn.rows):  # the next run may overwrite them
                    output = output._replace(logits=np.asarray(output.logits)[..., : self.vocab_size])
            except Exception as error:
                self._discard_state()
                for row in turn.rows:
                    self.fail(row.sequence, error)
                return False
            self._in_flight.append(_InFlight(turn, output))
        return True

    def _close(self, sequence: Sequence) -> None:
        self.scheduler.close(sequence)
        if sequence.speculation is not None:
            sequence.speculation.close()

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends a sequence with an error."""
        self._close(sequence)
        sequence.sink.fail(error)

    def _read(self, steps: Iterable[_InFlight]) -> None:
        for under_way in steps:
            turn, output = under_way
            key = turn.step.key
            drawn = np.zeros(key.drawn, np.int32)
            if self._yields(under_way) or any(row.last and row.sequence.drawing is not None for row in turn.rows):
                drawn = np.asarray(output.token_b1).reshape(-1, key.drawn[1])  # waits for it
            features = np.asarray(output.features) if key.taps else None
            for row in turn.rows:
                sink = row.sequence.sink
                logits = output.logits[row.index] if sink.wants_logits(row) else None
                token_t = drawn[row.index].tolist()
                try:
                    if key.kind == "verify" and not row.sequence.every_logits:
                        speculation.take(row, token_t, logits, goes_back=self.scheduler.is_recurrent)
                    else:
                        sink.take(row, token_t[0], logits)
                    if features is not None:
                        speculation.give_features(row, key.taps, features[row.index])
                except Exception as error:  # of a tokenizer, or of a caller's stopping criterion
                    self.fail(row.sequence, error)

    def compute(self, sequences: SequenceOf[Sequence]) -> None:
        """Steps until all tokens of `sequences` are computed and their sinks have the outputs.

        Raises the first error of any of them.
        """
        with self.lock:
            for sequence in sequences:
                self.scheduler.submit(sequence)
        try:
            while True:
                with self.lock:
                    for sequence in sequences:
                        if sequence.sink.error is not None:
                            raise sequence.sink.error
                    if all(sequence.sink.done for sequence in sequences):
                        return
                    self.step()
        finally:
            with self.lock:
                for sequence in sequences:
                    self.scheduler.pause(sequence)

    def keep_prefix(self, tokens: SequenceOf[int] | None, adapter: int = 0) -> None:
        """Computes tokens once, for the sequences of an adapter that start with them; None drops the kept prefix."""
        with self.lock:
            self.scheduler.slots.keep_prefix(None, aside=False)
            if tokens is None:
                return
            sink = Collector(self, every=False, holds=True)
            sequence = Sequence([int(token) for token in tokens], adapter=adapter, sink=sink)
            self.compute([sequence])
            target_slot = self.scheduler.slots.keep_prefix(sequence, aside=self.runtime.programs is None)
            if target_slot is not None:
                self.runtime.copy(np.array([sequence.slot], np.int32), np.array([target_slot], np.int32))
            self.scheduler.close(sequence)

    def poison(self, sequence: Sequence) -> None:
        """Clears the slot of a sequence whose state is not finite."""
        if sequence.slot is not None:
            self.runtime.clear(np.array([sequence.slot], np.int32))
            sequence.computed = 0

    def not_finite(self, row: int) -> NonFiniteError:
        """The error of logits that are not finite. It reads all weights, to name a tensor that is not finite."""
        tensor = self.first_not_finite()
        why = (
            f"so does tensor {tensor}: load a sound checkpoint"
            if tensor
            else "no tensor of the model does: a sum grew beyond the range of the dtype. "
            "Make the model with amp='bf16' or 'f32'"
        )
        return NonFiniteError(f"the logits of row {row} hold a number that is not finite (NaN or infinity), and {why}")

    def _discard_state(self) -> None:
        """Discards the state table after a fault; every sequence is computed again."""
        self._in_flight = []
        self.scheduler.forget()
        self.runtime.reset(*(self.scheduler.largest if self.reserved else self.scheduler.sizes() or (1, 1)))

    def reserve(self, budget: int, *, drafter: Drafter | None = None) -> SequenceOf[ProgramKey]:
        """Readies the engine for callers that come and go: their turns wait for no compilation, nor for a long prompt.

        The state table keeps its largest size from now on, a turn takes at most `budget` tokens of prompts, and where
        the runtime compiles on demand, every program draws from the whole vocabulary.

        drafter: that of all callers; None where there are no drafts.

        Returns programs that are faster than those in use, for `runtime.load`; another thread may load them.
        """
        with self.lock:
            self.reserved = True
            if self.runtime.programs is None:
                readiness = self.scheduler.reserve(budget, self.vocab_size, self.runtime.loaded, drafter)
                first, rest = readiness.first, readiness.rest
            else:
                self.scheduler.budget = budget
                first, rest = sorted(self.runtime.programs), []
            self._discard_state()
            self.runtime.load(first)
            self.compute([sequence := Sequence([0], sink=Collector(self))])
            self.scheduler.close(sequence)
            if isinstance(drafter, FeatureDrafter):
                drafter.reserve(*self.scheduler.largest)
            if self.scheduler.batch_sizes[-1] > 1:
                self.runtime.copy(np.array([0], np.int32), np.array([1], np.int32))
            return rest
