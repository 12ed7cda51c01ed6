"""Runs what another's scheduler plans: a number of tokens of some requests a turn, each in a slot of the state table.

It knows no vLLM: requests are plain data.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.engine.likelihood import Likelihood, PromptLikelihoods, likelihood
from jx_neuron.engine.options import Choice
from jx_neuron.engine.readiness import Readiness
from jx_neuron.engine.rotations import Rotations
from jx_neuron.errors import ConfigError, InputError, NonFiniteError
from jx_neuron.nn.sampling import NOT_FINITE
from jx_neuron.runtime.base import Runtime
from jx_neuron.step.buckets import fit, powers_of_two
from jx_neuron.step.program_key import Kind, ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput, StepRow


@dataclass(eq=False)
class Request:
    """One answer.

    tokens:     the prompt, and what was drawn so far.
    prompt:     how many tokens the prompt has.
    choice:     how tokens are chosen; its steps, end tokens and stop strings are the scheduler's matter.
    likelihoods: of the prompt's tokens, where they are wanted; None where they are not.
    constrained: whether `Runner.choose` gets a mask for its tokens.
    slot:       None before its first turn, and while it is preempted.
    """

    tokens: list[int]
    prompt: int
    choice: Choice
    likelihoods: PromptLikelihoods | None = None
    constrained: bool = False
    slot: int | None = None

    @property
    def answer(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[self.prompt :]


class Chosen(NamedTuple):
    """The token that follows a request's tokens, and how likely it is, where that is wanted."""

    token: int
    likelihood: Likelihood | None


@dataclass(frozen=True)
class _Part:
    """Tokens of a request that go through one step."""

    request: Request
    start: int
    count: int
    last: bool  # of the turn


class _Drawn(NamedTuple):
    """The result of a step for a request: a row of its outputs, and the logits [v] where the host chooses."""

    output: StepOutput
    row: int
    logits_v: np.ndarray | None


class Runner:
    """Requests by name, and the slots of a runtime.

    settings: those of the runtime's programs, or of a runtime that compiles on demand.
    budget:   most tokens of a step that takes several prompts.

    Raises ConfigError for a model whose keys depend on where a prompt ends.
    """

    def __init__(self, runtime: Runtime, settings: Settings, budget: int):
        self.runtime, self.settings, self.requests = runtime, settings, dict[str, Request]()
        on_demand, buckets = runtime.programs is None, settings.buckets
        self.candidates = settings.vocab_size if on_demand else settings.candidates
        self._budget = budget
        if settings.rotations is not None and buckets.capacity > (limit := Rotations(*settings.rotations).limit):
            raise ConfigError(
                f"this model rotates keys by the length of a prompt beyond {limit} tokens, and a scheduler may cut "
                f"prompts anywhere; make it with at most {limit} positions"
            )
        self._prompt_rows: Sequence[int] = powers_of_two(settings.slots) if on_demand else settings.batch_sizes
        if settings.prompt_batch:
            self._prompt_rows = [settings.prompt_batch]
        self._whole_sizes = [t for t in buckets.context if t > 1]
        behind = buckets.context if on_demand else buckets.context[-1:]
        self._chunk_sizes = [t for t in behind if 1 < t < buckets.capacity]
        self._readiness: Readiness | None = None
        self._drawn: dict[Request, _Drawn] = {}

    def warm_up(self, *, every: bool) -> None:
        """Loads programs, so that no turn waits: all where `every` is true, else the largest, which stand for all."""
        slots, positions = max(self.settings.slots, self._prompt_rows[-1]), self.settings.buckets.capacity
        self.runtime.reset(slots, positions)
        if self.runtime.programs is not None:
            self.runtime.load(sorted(self.runtime.programs))
            return
        self._readiness = Readiness.of(
            self.settings.buckets,
            self.settings.batch_sizes,
            self._prompt_rows,
            self._chunk_sizes,
            (),
            self._budget,
            self.candidates,
            self.runtime.loaded,
        )
        self.runtime.load([*self._readiness.first, *(self._readiness.rest if every else ())])

    def add(self, name: str, request: Request) -> None:
        """Takes a new request. Raises InputError where no program gives the logits that it wants."""
        if request.likelihoods is not None and self.runtime.programs is not None and not self.settings.all_logits:
            raise InputError("log-probabilities of prompts take programs that give all logits; make them so")
        self.requests[name] = request

    def preempt(self, name: str) -> None:
        """Takes a request's slot away; it is computed from its first token again."""
        if (request := self.requests.get(name)) is not None:
            request.slot = None

    def finish(self, name: str) -> None:
        """Forgets a request, answered or cancelled."""
        self.requests.pop(name, None)

    def run(self, scheduled: Mapping[str, tuple[int, int]]) -> None:
        """Computes tokens of requests: by name, the position of the first, and how many."""
        self._drawn = {}
        parts = [list(self._parts(self._placed(name), *range_)) for name, range_ in scheduled.items()]
        while parts := [several for several in parts if several]:
            turn = [several.pop(0) for several in parts]
            if single := [part for part in turn if part.count == 1]:
                self._decode(single)
            others = [part for part in turn if part.count > 1]
            while others:
                group = self._alike(others)
                self._prefill(group)
                others = [part for part in others if part not in group]

    def choose(self, names: Iterable[str], masks: Mapping[str, np.ndarray]) -> dict[str, Chosen]:
        """The next tokens of requests whose tokens have all been computed, which they take.

        masks: the tokens that may follow, bool [v], of requests that are constrained.

        Raises NonFiniteError for logits with a NaN or an infinity.
        """
        chosen = {}
        for name in names:
            request = self.requests[name]
            drawn, how = self._drawn[request], None
            if drawn.logits_v is None:
                token = int(np.asarray(drawn.output.token_b1).reshape(-1)[drawn.row])  # JAX keeps what was read
            elif np.isfinite(drawn.logits_v).all():
                token = self._choose(request, drawn.logits_v, masks.get(name))
                if request.choice.logprobs is not None:
                    how = likelihood(drawn.logits_v, token, request.choice.logprobs)
            else:
                token = NOT_FINITE
            if token == NOT_FINITE:
                self.runtime.clear(np.array([request.slot], np.int32))
                raise NonFiniteError(
                    f"the logits of request {name} hold a NaN or an infinity; load a sound checkpoint, or compute in "
                    "bfloat16 or float32"
                )
            request.tokens.append(token)
            chosen[name] = Chosen(token, how)
        return chosen

    def _choose(self, request: Request, logits_v: np.ndarray, mask_v: np.ndarray | None) -> int:
        choice, answer = request.choice, request.answer
        if choice.processors.active:
            logits_v = choice.processors(logits_v, request.tokens[: request.prompt], answer)
        if mask_v is not None:
            logits_v = np.where(mask_v, logits_v, np.float32(-np.inf))
        if choice.grammar is None:
            return choice.draw.choose(logits_v, len(answer))
        token = choice.draw.choose(choice.grammar.mask_logits(logits_v), len(answer))
        choice.grammar.accept(token)
        return token

    def on_host(self, request: Request) -> bool:
        """Whether the host chooses a request's tokens from logits, and not the program."""
        choice = request.choice
        return choice.on_host or request.constrained or choice.draw.candidates > self.candidates

    # ---- slots

    def _placed(self, name: str) -> Request:
        """The request, with a slot: the lowest that is free."""
        request = self.requests[name]
        if request.slot is None:
            request.slot = next(slot for slot in range(self.settings.slots) if slot not in self._owners())
        return request

    def _owners(self) -> dict[int, Request]:
        return {request.slot: request for request in self.requests.values() if request.slot is not None}

    def _compact(self) -> None:
        """Moves requests to lower slots where a decode step of fewer rows then takes all."""
        owners = self._owners()
        least = fit(self.settings.batch_sizes, len(owners))
        free = (slot for slot in range(least) if slot not in owners)
        for slot, request in sorted(owners.items()):
            if slot >= least:
                request.slot = next(free)
                self.runtime.copy(np.array([slot], np.int32), np.array([request.slot], np.int32))

    # ---- steps

    def _parts(self, request: Request, start: int, count: int) -> Iterator[_Part]:
        """Tokens of a turn, as many at a time as one step takes."""
        end = start + count
        while start < end:
            sizes = self._chunk_sizes if start else self._whole_sizes
            taken = min(sizes[-1] if sizes else 1, end - start)
            start += taken
            yield _Part(request, start - taken, taken, start == end)

    def _alike(self, parts: Sequence[_Part]) -> list[_Part]:
        """Parts that go through one program, the first of `parts` among them."""
        kind, behind = _kind(parts[0]), parts[0].start > 0
        same = [part for part in parts if (_kind(part), part.start > 0) == (kind, behind)]
        most = self._prompt_rows[0 if self._readiness and (behind or kind == "score") else -1]
        sizes = self._chunk_sizes if behind else self._whole_sizes
        for n in range(min(len(same), most), 1, -1):
            tokens = fit(sizes, max(part.count for part in same[:n]))
            if self._readiness is None or fit(self._prompt_rows, n) * tokens <= self._budget:
                return same[:n]
        return same[:1]

    def _prefill(self, parts: Sequence[_Part]) -> None:
        behind = parts[0].start > 0
        tokens = fit(self._chunk_sizes if behind else self._whole_sizes, max(part.count for part in parts))
        end = max(part.start + part.count for part in parts)
        positions = self.settings.buckets.positions(end, tokens) if behind else tokens
        self._step(_kind(parts[0]), fit(self._prompt_rows, len(parts)), tokens, positions, parts)

    def _decode(self, parts: Sequence[_Part]) -> None:
        self._compact()
        rows = fit(self.settings.batch_sizes, 1 + max(_slot(part) for part in parts))
        self._step("decode", rows, 1, self.settings.buckets.positions(max(p.start for p in parts) + 1), parts)

    def _step(self, kind: Kind, rows: int, tokens: int, positions: int, parts: Sequence[_Part]) -> None:
        key = ProgramKey(kind, rows, tokens, positions, self.candidates)
        if self._readiness is not None:
            key = self._readiness.fitting(key, behind=parts[0].start > 0) or key
        step = StepInput.of(key, [self._row(part) for part in parts], self.settings.slots)
        output = self.runtime.run(step)
        wanted = [part for part in parts if part.request.likelihoods or (part.last and self.on_host(part.request))]
        logits = np.asarray(output.logits)[..., : self.settings.vocab_size] if wanted else None  # before the next run
        for number, part in enumerate(parts):
            row = _slot(part) if key.in_place else number
            logits_tv = None if logits is None else np.atleast_2d(logits[row])[: part.count]
            if part.request.likelihoods is not None and logits_tv is not None:
                part.request.likelihoods.add(part.start, logits_tv)
            if part.last:
                last_v = logits_tv[-1] if logits_tv is not None and self.on_host(part.request) else None
                self._drawn[part.request] = _Drawn(output, row, last_v)

    def _row(self, part: _Part) -> StepRow:
        request, start, end = part.request, part.start, part.start + part.count
        drawing = request.choice.draw if part.last and not self.on_host(request) else None
        tokens = request.tokens[start:end]
        return StepRow(_slot(part), tokens, start, part.count, drawing, max(0, end - request.prompt))


def _kind(part: _Part) -> Kind:
    return "prefill" if part.request.likelihoods is None or part.start >= part.request.prompt else "score"


def _slot(part: _Part) -> int:
    assert part.request.slot is not None
    return part.request.slot
