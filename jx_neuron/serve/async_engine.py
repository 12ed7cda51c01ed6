"""Many callers on one event loop: one thread steps the engine, and sends what each turn gave to the loop at once."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from jx_neuron.engine.generation import Request, RunningAnswer, start
from jx_neuron.engine.likelihood import Likelihood
from jx_neuron.engine.options import SamplingParams
from jx_neuron.engine.ticket import Event
from jx_neuron.errors import JxNeuronError

if TYPE_CHECKING:
    from jx_neuron.llm.model import NeuronAutoModelForCausalLM

MOST_FAILURES = 3
"""Turns in a row that fail before the engine counts as unhealthy."""


class QueueFull(JxNeuronError):  # noqa: N818
    """As many requests wait as may.

    retry_after: seconds in which as many would begin at the recent rate, 1 to 60.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait, as many as may; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class ShuttingDown(JxNeuronError):  # noqa: N818
    """The engine takes no more requests, or has ended this one, since it shuts down."""


class DeadlineExceeded(JxNeuronError):  # noqa: N818
    """The request's deadline passed before its answers ended."""


class EngineFailed(JxNeuronError):  # noqa: N818
    """A turn failed for good, or hangs."""


@dataclass
class Timings:
    """When a request went through its stages, by `time.perf_counter()`; None for stages ahead.

    arrived:       it was submitted.
    started:       it was given a slot.
    first_token:   its first token was drawn.
    finished:      its last answer ended.
    cached_tokens: tokens of the prompt whose state was found in a slot.
    """

    arrived: float
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """The engine's load, and what it has done so far.

    running, waiting:  answers with a slot, and without one yet.
    kv_cache_usage:    share of the slots that are taken, 0 to 1.
    prompt_tokens:     tokens of the prompts that were computed.
    generation_tokens: tokens of answers.
    prefix_queries:    tokens of prompts that were looked for in slots.
    prefix_hits:       tokens of those that were found.
    preemptions:       answers that lost their slot, and were computed again.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int


class _News(NamedTuple):
    """What a turn gave for a stream; `ended` once nothing follows."""

    stream: "Stream"
    events: Sequence[Event]
    error: BaseException | None
    ended: bool


class Stream:
    """The events of a request's answers, as an asynchronous iterator; it raises the request's error.

    timings: when the request went through its stages.
    """

    def __init__(self, engine: "AsyncEngine", request: Request):
        self._engine, self.request = engine, request
        self.timings = Timings(time.perf_counter())
        self.answers: list[RunningAnswer] = []  # of the engine's thread
        self.cancelled = False  # written on the loop, and read by the thread
        self._events = deque[Event]()
        self._error: BaseException | None = None
        self._ended = False
        self._reader: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def prompt_logprobs(self) -> list[Likelihood | None] | None:
        """The likelihood of each token of the prompt, None for the first; known once there is an event. None where
        they were not requested."""
        return self.answers[0].ticket.prompt_likelihoods if self.answers else None

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._events.popleft()

    def cancel(self) -> None:
        """Ends the answers; their slots are free at the next turn. Nothing happens where they have ended."""
        self._engine.end(self, None)

    def receive(self, events: Iterable[Event], error: BaseException | None, ended: bool) -> None:
        """Takes what a turn gave, on the loop."""
        if self._ended:
            return
        self._events.extend(events)
        self._error, self._ended = error, ended
        if ended and self.timer is not None:
            self.timer.cancel()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether no event will be added."""
        return self._ended


class AsyncEngine:
    """Runs the requests of one event loop on a model's engine, which a thread steps.

    most_waiting:     requests that may wait for a slot before `submit` raises QueueFull.
    seconds_per_turn: a turn that takes longer counts as a hang: all requests fail, and `healthy` is False.
    readied:          sampling parameters whose programs are loaded before the first turn; others load theirs when they
                      are first used, while all wait.
    draft:            that of the model's `generate`, for all requests.

    A turn takes one token of each answer, then as many tokens of prompts as the model's largest context bucket has. So
    its `context_length_estimate` is how long a prompt may stall others, and how much of a prefix is reused: 32 suits a
    CPU.
    """

    def __init__(
        self,
        model: "NeuronAutoModelForCausalLM",
        *,
        most_waiting: int = 256,
        seconds_per_turn: float = 60.0,
        readied: Sequence[SamplingParams] = (SamplingParams(), SamplingParams(temperature=1.0)),
        draft: Any = None,
    ):
        self._drafter = model.drafter(draft)
        self._readied = readied
        self._model, self._most_waiting, self._seconds_per_turn = model, most_waiting, seconds_per_turn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._run, name="jx-neuron-engine", daemon=True)
        self._wake = Flag()
        self._arrived = deque[Stream]()  # the loop appends, the thread takes
        self._live: dict[Stream, None] = {}  # of the loop
        self._idle = asyncio.Event()
        self._began: deque[float] = deque(maxlen=64)  # when requests were given slots
        self._ready = self._closing = self._stopping = self._watched = False
        self._failure: BaseException | None = None
        self._failures = 0
        self._turn_began: float | None = None
        self._prompt_tokens = self._generation_tokens = 0

    def start(self) -> None:
        """Starts the thread, which first readies the programs."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the programs are ready, turns succeed, and none hangs."""
        return self._ready and self._failure is None and self._failures < MOST_FAILURES and not self._hangs

    @property
    def _hangs(self) -> bool:
        began = self._turn_began
        return began is not None and time.perf_counter() - began > self._seconds_per_turn

    def stats(self) -> Stats:
        """The load, and what was done so far."""
        engine = self._model.engine
        scheduler = engine.scheduler
        slots = scheduler.batch_sizes[-1]
        answers = sum(len(stream.request.choices) for stream in self._live)
        running = sum(answer.ticket.sequence.slot is not None for stream in self._live for answer in stream.answers)
        return Stats(
            running,
            answers - running,
            min(slots - scheduler.free_slots, slots) / slots,
            self._prompt_tokens,
            self._generation_tokens,
            scheduler.prefix_queries,
            scheduler.prefix_hits,
            scheduler.preemptions,
        )

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        deadline: float | None = None,
        prompt_logprobs: int | None = None,
    ) -> Stream:
        """Submits a prompt for `sampling.n` answers. To be called on the event loop.

        deadline:        seconds from now after which the stream raises DeadlineExceeded; None for no limit.
        prompt_logprobs: gives the likelihood of each token of the prompt, with so many of the most likely tokens.

        Raises InputError where the model cannot take the request, QueueFull, ShuttingDown, and EngineFailed.
        """
        if self._closing:
            raise ShuttingDown("the server shuts down; send the request to another")
        if self._failure is not None or self._hangs:
            raise self._failed()
        request = self._model.request(prompt, sampling, prompt_logprobs, draft=self._drafter)
        waiting = sum(stream.timings.started is None for stream in self._live)
        if waiting >= self._most_waiting:
            raise QueueFull(waiting, self._retry_after(waiting))
        stream = Stream(self, request)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        if deadline is not None:
            error = DeadlineExceeded(f"the answers had not ended after {deadline:g} s")
            stream.timer = self._loop.call_later(deadline, self.end, stream, error)
        self._live[stream] = None
        if not self._watched:
            self._watch(self._loop)
        self._idle.clear()
        self._arrived.append(stream)
        self._wake.set()
        return stream

    def end(self, stream: Stream, error: BaseException | None) -> None:
        """Ends a stream before its answers have ended, on the loop."""
        if not stream.ended:
            stream.cancelled = True
            self._receive([_News(stream, (), error, True)])
            self._wake.set()

    async def shutdown(self, seconds: float | None = None) -> None:
        """Takes no more requests, and waits until the running ones have ended; after `seconds`, these raise
        ShuttingDown. Then the thread ends, unless a turn hangs."""
        self._closing = True
        if self._live:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)
        self._end_all(ShuttingDown("the server shut down before the answer had ended"))
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, 0 if self._hangs else self._seconds_per_turn)

    def _retry_after(self, waiting: int) -> float:
        if len(self._began) < 2:
            return 1.0
        rate = len(self._began) / (time.perf_counter() - self._began[0])
        return min(max(1.0, waiting / rate), 60.0)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fails all requests once a turn hangs."""
        if self._hangs:
            self._end_all(self._failed())
        self._watched = bool(self._live)
        if self._watched:
            loop.call_later(min(1.0, self._seconds_per_turn / 4), self._watch, loop)

    def _failed(self) -> EngineFailed:
        if self._failure is not None:
            return EngineFailed(f"the engine failed: {self._failure}; restart the server")
        return EngineFailed(f"a turn of the engine takes more than {self._seconds_per_turn:g} s; restart the server")

    def _end_all(self, error: BaseException) -> None:
        for stream in list(self._live):
            self.end(stream, error)

    def _receive(self, news: Iterable[_News]) -> None:
        """Takes what a turn gave, on the loop."""
        for stream, events, error, ended in news:
            stream.receive(events, error, ended)
            if ended:
                self._live.pop(stream, None)
        if not self._live:
            self._idle.set()

    # ---- the thread

    def _run(self) -> None:
        running: list[Stream] = []
        try:
            self._warm_up()
            while running or self._model.engine.closing or not self._stopping:
                if not (running or self._arrived or self._model.engine.closing):
                    self._wake.wait()
                    self._wake.clear()
                while self._arrived:
                    stream = self._arrived.popleft()
                    if not stream.cancelled:
                        stream.answers = start(self._model.engine, stream.request)
                        running.append(stream)
                for stream in running:
                    if stream.cancelled:
                        _close(stream)
                running = [stream for stream in running if not stream.cancelled]
                self._turn_began = time.perf_counter()
                self._model.engine.step()
                self._turn_began = None
                news = [self._news(stream) for stream in running]
                self._send([one for one in news if one.events or one.ended])
                ended = {one.stream for one in news if one.ended}
                running = [stream for stream in running if stream not in ended]
        except BaseException as error:
            self._failure = error
            for stream in running:
                _close(stream)
            self._send([_News(stream, (), self._failed(), True) for stream in (*running, *self._arrived)])
        finally:
            self._turn_began = None

    def _warm_up(self) -> None:
        model = self._model
        candidates = {model.request([0], sampling).choices[0].draw.candidates for sampling in self._readied}
        verifies = self._drafter is not None
        model.engine.reserve(model.buckets.context[-1], sorted(candidates), verifies=verifies)
        self._ready = True

    def _send(self, news: Sequence[_News]) -> None:
        if news and self._loop is not None:
            with suppress(RuntimeError):  # of a loop that is closed
                self._loop.call_soon_threadsafe(self._receive, news)

    def _news(self, stream: Stream) -> _News:
        """What the last turn gave for a stream."""
        timings, now = stream.timings, time.perf_counter()
        if timings.started is None and (sequence := stream.answers[0].ticket.sequence).slot is not None:
            timings.started, timings.cached_tokens = now, sequence.cached
            self._began.append(now)
        events: list[Event] = []
        error: BaseException | None = None
        try:
            for answer in stream.answers:
                while answer.ticket.ready:
                    events.append(answer.next())
        except Exception as raised:
            error = raised
            _close(stream)
        self._failures = self._failures + 1 if error is not None else 0 if events else self._failures
        if events:
            self._generation_tokens += len(events)
            if timings.first_token is None:
                timings.first_token = now
                self._prompt_tokens += len(stream.request.prompt)
        ended = error is not None or all(answer.ticket.closed and not answer.ticket.ready for answer in stream.answers)
        if ended:
            timings.finished = now
        return _News(stream, events, error, ended)


def _close(stream: Stream) -> None:
    for answer in stream.answers:
        answer.ticket.close()
