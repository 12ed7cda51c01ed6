"""Discrete-event simulation of a server: its own engine and scheduler, on a clock that only steps advance."""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jx_neuron.engine.draw import Draw
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.options import Choice
from jx_neuron.engine.processors import Processors
from jx_neuron.engine.ticket import Ticket
from jx_neuron.planning.load import Arrival, Load
from jx_neuron.planning.step_times import StepTimes
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput
from jx_neuron.util.arguments import integer

TOKENS_PER_TURN, MOST_WAITING = 256, 256
"""The defaults of a server."""

GREEDY = Draw(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, min_tokens=1, candidates=1, key=None)


@dataclass(frozen=True)
class Spread:
    """Seconds of many requests or tokens: the mean, the median, and what 95 and 99 of 100 do not exceed."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """The spread of at least one number."""
        return cls(statistics.fmean(seconds), *np.percentile(seconds, [50, 95, 99]).tolist())


@dataclass(frozen=True)
class Service:
    """The result of a load.

    requests:            those answered.
    refused:             requests that came while the queue was full.
    seconds:             from the first arrival to the last token.
    tokens_per_second:   of answers.
    first_token:         from a request's arrival to its first token.
    between_tokens:      from one token of an answer to the next; of answers of one token 0.
    whole:               from a request's arrival to its last token.
    """

    requests: int
    refused: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_token: Spread
    between_tokens: Spread
    whole: Spread

    @classmethod
    def of(cls, requests: Iterable[tuple[float, Sequence[float]]], refused: int = 0) -> "Service":
        """The service of requests: when each arrived, and when each of its tokens came."""
        answered = list(requests)
        seconds = max(tokens[-1] for _, tokens in answered) - min(arrived for arrived, _ in answered)
        gaps = [later - token for _, tokens in answered for token, later in pairwise(tokens)]
        return cls(
            len(answered),
            refused,
            seconds,
            len(answered) / seconds,
            sum(len(tokens) for _, tokens in answered) / seconds,
            Spread.of([tokens[0] - arrived for arrived, tokens in answered]),
            Spread.of(gaps or [0.0]),
            Spread.of([tokens[-1] - arrived for arrived, tokens in answered]),
        )


@dataclass(frozen=True)
class Simulated(Service):
    """The service of a simulated server, or of several replicas.

    busy:       the share of the time in which devices compute.
    cached:     the share of the prompts' tokens that slots held already.
    """

    busy: float = 0.0
    cached: float = 0.0


class _Clock:
    now = 0.0


class _Timed:
    """An array of a step's outputs, zeros: reading it waits until the step is done."""

    def __init__(self, clock: _Clock, done: float, shape: tuple[int, ...], dtype: Any):
        self._clock, self._done, self._shape, self._dtype = clock, done, shape, dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._clock.now = max(self._clock.now, self._done)
        return np.zeros(self._shape, dtype or self._dtype)


class TimedRuntime:
    """A runtime that computes nothing: a step takes the seconds that `times` say, one after another.

    Attributes:
        busy: seconds in which it computed.
    """

    def __init__(self, clock: _Clock, times: StepTimes):
        self.programs, self._clock, self._times = times.programs, clock, times
        self._loaded: set[ProgramKey] = set()
        self._free = self.busy = 0.0

    def load(self, programs: Iterable[ProgramKey]) -> None:
        """Compiles in no time: a server that is up has its programs."""
        self._loaded.update(programs)

    def loaded(self, program: ProgramKey) -> bool:
        return program in self._loaded

    def run(self, step: StepInput) -> StepOutput:
        key = step.key
        done = self._compute(self._times.step(key))
        logits = (key.rows, key.tokens, 1) if key.gives_every else (key.rows, 1)
        return StepOutput(_Timed(self._clock, done, key.drawn, np.int32), _Timed(self._clock, done, logits, np.float32))

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        self._compute(self._times.copy(len(source_n)))

    def clear(self, slot_n: np.ndarray) -> None:
        """Takes no time."""

    def reset(self, slots: int, positions: int) -> None:
        """Takes no time."""

    def _compute(self, seconds: float) -> float:
        self._free = max(self._clock.now, self._free) + seconds
        self.busy += seconds
        return self._free


@dataclass
class _Running:
    arrived: float
    ticket: Ticket
    tokens: list[float]


class Replica:
    """A server: what `AsyncEngine` does a turn, on a clock of its own."""

    def __init__(self, times: StepTimes, tokens_per_turn: int, most_waiting: int):
        self._clock, self._times = _Clock(), times
        self._runtime = TimedRuntime(self._clock, times)
        self._engine = Engine.of_model(self._runtime, times.settings, lambda: None)
        self._most_outstanding = self._engine.scheduler.batch_sizes[-1] + most_waiting
        budget = max(times.settings.buckets.context[-1], tokens_per_turn)
        self._runtime.load(self._engine.reserve(budget))
        self._clock.now = self._runtime._free = self._runtime.busy = 0.0
        self._arrived: deque[Arrival] = deque()
        self._running: list[_Running] = []
        self.answered: list[_Running] = []
        self.refused = 0

    @property
    def outstanding(self) -> int:
        """Requests that are not answered yet."""
        return len(self._arrived) + len(self._running)

    @property
    def busy(self) -> float:
        """Seconds in which the device computed."""
        return self._runtime.busy

    @property
    def prefixes(self) -> tuple[int, int]:
        """Tokens of prompts that slots held already, and all."""
        return self._engine.scheduler.prefix_hits, self._engine.scheduler.prefix_queries

    def submit(self, arrival: Arrival) -> None:
        """Takes a request, which arrives after those before it. Refuses it where as many wait as may."""
        if self.outstanding >= self._most_outstanding:
            self.refused += 1
        else:
            self._arrived.append(arrival)

    def advance(self, until: float = float("inf")) -> None:
        """Runs turns that begin before `until`, or all there are."""
        while self.outstanding:
            if not self._running:
                self._clock.now = max(self._clock.now, self._arrived[0].at + self._times.request)
            if self._clock.now >= until:
                return
            self._turn()

    def _turn(self) -> None:
        while self._arrived and self._arrived[0].at + self._times.request <= self._clock.now:
            arrival = self._arrived.popleft()
            choice = Choice(GREEDY, Processors(), arrival.answer, (), (), None)
            (ticket,) = self._engine.submit(arrival.prompt, [choice])
            self._running.append(_Running(arrival.at, ticket, []))
        self._clock.now += self._times.turn
        self._engine.step()
        count = 0
        for request in self._running:
            while request.ticket.ready:
                next(request.ticket)
                request.tokens.append(self._clock.now)
                count += 1
        self._clock.now += self._times.token * count
        self.answered += [request for request in self._running if request.ticket.closed]
        self._running = [request for request in self._running if not request.ticket.closed]


def simulate(
    times: StepTimes,
    load: Load | Sequence[Arrival],
    *,
    requests: int = 400,
    replicas: int = 1,
    tokens_per_turn: int = TOKENS_PER_TURN,
    most_waiting: int = MOST_WAITING,
    seed: int = 0,
) -> Simulated:
    """Simulates servers under a load.

    Each is the engine of this package on a runtime that only counts time, so it schedules as a server does: one token
    of each answer first, then chunks of prompts within `tokens_per_turn`; slots, buckets, and prefixes that slots hold.
    A request goes to the replica with the fewest outstanding ones. Answers end after as many tokens as the load says.

    times:           seconds of each step, `Measured` or `Estimated`, and the settings of a server.
    load:            a load, of which the first `requests` come, or requests in the order of their arrival.
    most_waiting:    requests of a replica that may wait for a slot; more are refused.
    seed:            of the load's random numbers.

    Raises InputError where a request has more tokens than the model has positions.
    """
    integer("requests", requests, most=10**6)
    integer("replicas", replicas, most=10**4)
    servers = [Replica(times, tokens_per_turn, most_waiting) for _ in range(replicas)]
    for arrival in load.arrivals(requests, seed) if isinstance(load, Load) else load:
        times.require_room(len(arrival.prompt) + arrival.answer)
        for server in servers:
            server.advance(arrival.at)
        min(servers, key=lambda server: server.outstanding).submit(arrival)
    for server in servers:
        server.advance()
    service = Service.of(
        [(request.arrived, request.tokens) for server in servers for request in server.answered],
        sum(server.refused for server in servers),
    )
    hits, queries = (sum(column) for column in zip(*(server.prefixes for server in servers), strict=True))
    busy = sum(server.busy for server in servers) / (service.seconds * replicas)
    return Simulated(**vars(service), busy=min(busy, 1.0), cached=hits / queries if queries else 0.0)
