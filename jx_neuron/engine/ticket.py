"""One running answer: its events, and why it ended."""

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jx_neuron.engine.drafting import Drafter, Drafts, Speculation
from jx_neuron.engine.likelihood import Likelihood, PromptLikelihoods, likelihood
from jx_neuron.engine.options import Choice
from jx_neuron.engine.sequence import Row, Sequence
from jx_neuron.engine.stopping import StopStrings
from jx_neuron.nn.sampling import NOT_FINITE

if TYPE_CHECKING:
    from jx_neuron.engine.engine import Engine


@dataclass(frozen=True)
class Event:
    """One token of one answer.

    token:          the token's id.
    logprob:        natural log-probability of the token before sampling parameters apply; None unless requested.
    top:            the most likely tokens, most likely first, and their log-probabilities; empty unless requested.
    finish_reason:  None while the answer runs; "stop" where an end token, a stop string or a criterion ends it; or
                    "length".
    seconds:        since the prompt was submitted.
    prompt, answer: indices of the prompt in the call, and of the answer to it, from 0.
    text:           the text that the answer gained; None where there is no tokenizer. A character of several tokens
                    comes with the last of them.
    drafts:         with an answer's last token, what its drafts came to; None without a drafter.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish_reason: str | None
    seconds: float
    prompt: int = 0
    answer: int = 0
    text: str | None = None
    drafts: Drafts | None = None


class Ticket:
    """A running answer. Iterating over it yields its events, and raises its errors, such as NonFiniteError."""

    def __init__(
        self,
        engine: "Engine",
        prompt: list[int],
        choice: Choice,
        row: int,
        tokenizer: Any,
        drafter: Drafter | None = None,
        adapter: int = 0,
    ):
        self._engine, self._choice, self._row = engine, choice, row
        self._began = time.perf_counter()
        self._strings = StopStrings(choice.stop_strings, tokenizer, prompt) if choice.stop_strings else None
        self._prompt, self._answer = prompt, list[int]()
        self._events = deque[Event]()
        self._error: BaseException | None = None
        self.closed = False
        self.siblings: list[Ticket] = []
        self._of_prompt: PromptLikelihoods | None = None
        self._grammar = None if choice.grammar is None else choice.grammar.copy()
        self._drawing = None if choice.on_host else choice.draw
        limit = len(prompt) + choice.steps
        self.sequence = Sequence(list(prompt), limit, self._drawing, adapter=adapter, sink=self)
        if drafter is not None:
            self.sequence.speculation = Speculation(drafter, self.sequence.tokens)

    def __iter__(self) -> "Ticket":
        return self

    def __next__(self) -> Event:
        while True:
            with self._engine.lock:
                if self._events:
                    return self._events.popleft()
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if self.closed:
                    raise StopIteration
                self._engine.step()

    @property
    def ready(self) -> bool:
        """Whether an event or an error is available without another step."""
        return bool(self._events) or self._error is not None

    def close(self) -> None:
        """Cancels the answer. The prompt is still computed where other answers wait for it."""
        self.closed = True
        if not self.siblings:
            self._engine.closing.append(self.sequence)

    def score_prompt(self, count: int) -> None:
        """Has the log-probabilities of the prompt's tokens collected, with `count` of the most likely ones."""
        self._of_prompt, self.sequence.every_logits = PromptLikelihoods(self._prompt, count), True

    @property
    def prompt_likelihoods(self) -> list[Likelihood | None] | None:
        """Of each token of the prompt, whole before the first event; None where `score_prompt` was not called."""
        return None if self._of_prompt is None else self._of_prompt.values

    @property
    def drafts(self) -> Drafts | None:
        """The counts of the answer's drafts; None without a drafter."""
        speculation = self.sequence.speculation
        return None if speculation is None else speculation.drafts

    @property
    def on_host(self) -> bool:
        """Whether the next token is chosen from logits that the host reads."""
        return self._choice.on_host or bool(self.siblings)

    def wants_logits(self, row: Row) -> bool:
        """Whether the logits of a step's row are read."""
        live = not self.closed or bool(self.siblings)
        return live and (self.sequence.every_logits or (row.last and self.on_host))

    def take(self, row: Row, token: int, logits: np.ndarray | None) -> None:
        """Takes the outputs of a row: the token that the program drew, and where `wants_logits` the logits [v] of the
        last token, or [t, v] of each."""
        siblings = self.siblings
        if self.closed and not siblings:
            return
        if logits is not None and not np.isfinite(logits[: row.count] if logits.ndim == 2 else logits).all():
            token = NOT_FINITE
        elif logits is not None and logits.ndim == 2:
            if self._of_prompt is not None:
                self._of_prompt.add(row.start, logits[: row.count])
            logits = logits[row.count - 1]
        if token != NOT_FINITE and not row.last:
            return
        logits_v = logits if self.on_host else None
        if token != NOT_FINITE and logits_v is not None:
            token = self._choose(logits_v)
        if token == NOT_FINITE:
            self._engine.poison(self.sequence)
            self.fail(self._engine.not_finite(self._row))
            return
        self.siblings, self.sequence.every_logits = [], False
        if self.closed:
            self.close()
        else:
            self._engine.scheduler.take(self.sequence, token)
            self.sequence.drawing = self._drawing
            self._add(token, logits_v)
        for sibling in reversed(siblings):
            assert logits_v is not None
            sibling.begin(self.sequence, logits_v)

    def begin(self, source: Sequence, logits_v: np.ndarray) -> None:
        """Starts from a prompt that `source` has computed, and its logits [v]."""
        if self.closed:
            return
        token = self._choose(logits_v)
        self._add(token, logits_v)
        if not self.closed:
            self.sequence.tokens.append(token)
            self.sequence.source = source
            self._engine.scheduler.submit(self.sequence, first=True)

    def fail(self, error: BaseException) -> None:
        """Ends the answer with an error, which iterating over it raises."""
        siblings, self.siblings = self.siblings, []
        for ticket in (self, *siblings):
            ticket._error = error
            ticket.close()

    def _choose(self, logits_v: np.ndarray) -> int:
        choice = self._choice
        if choice.processors.active:
            logits_v = choice.processors(logits_v, self._prompt, self._answer)
        if self._grammar is None:
            return choice.draw.choose(logits_v, len(self._answer))
        token = choice.draw.choose(self._grammar.mask_logits(logits_v), len(self._answer))
        self._grammar.accept(token)
        return token

    def _add(self, token: int, logits_v: np.ndarray | None) -> None:
        choice = self._choice
        self._answer.append(token)
        ended = token in choice.eos
        if self._strings is not None and self._strings.ended_by(token):
            ended = True
        full = len(self._answer) >= choice.steps
        reason = "stop" if ended else "length" if full else None
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if choice.logprobs is not None and logits_v is not None:
            logprob, _, top = likelihood(logits_v, token, choice.logprobs)
        self._events.append(Event(token, logprob, top, reason, time.perf_counter() - self._began))
        if reason is not None:
            self.close()
