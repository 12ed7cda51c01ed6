"""Many callers on one event loop: one thread steps the engine, and sends what each turn gave to the loop at once."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from threading import Event as Flag
from threading import Thread, main_thread
from typing import TYPE_CHECKING, Any

from jx_neuron.engine.generation import start
from jx_neuron.engine.options import SamplingParams
from jx_neuron.engine.ticket import Event
from jx_neuron.errors import JxNeuronError
from jx_neuron.serve.stream import DeadlineExceeded, EngineFailed, News, QueueFull, ShuttingDown, Stream
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.util.progress import track

if TYPE_CHECKING:
    from jx_neuron.llm.model import NeuronAutoModelForCausalLM

LOG = logging.getLogger("jx_neuron.serve")
READY_SECONDS = 0.05  # between looks at whether the engine is ready
MOST_FAILURES = 3
"""Turns in a row that fail before the engine counts as unhealthy."""


@dataclass(frozen=True)
class Stats:
    """The engine's load, and what it has done so far.

    running, waiting:  answers with a slot, and without one yet.
    kv_cache_usage:    share of the slots that are taken, 0 to 1.
    prompt_tokens:     tokens of the prompts that were computed.
    generation_tokens: tokens of answers.
    prefix_queries:    tokens of prompts that were looked for in slots.
    prefix_hits:       how many of these were in a slot.
    preemptions:       answers that lost their slot, and were computed again.
    to_load:           programs that are yet to be compiled; answers are slower until there are none.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    to_load: int


class AsyncEngine:
    """Runs the requests of one event loop on a model's engine, which a thread steps.

    most_waiting:     requests that may wait for a slot before `submit` raises QueueFull. One for which a slot is free
                      does not wait.
    seconds_per_turn: a turn that takes longer counts as a hang: all requests fail, and `healthy` is False.
    tokens_per_turn:  most tokens of prompts in a turn.
    draft:            that of the model's `generate`, for all requests.

    A turn takes one token of each answer, then the first chunk of as many prompts as `tokens_per_turn` permits, or a
    later chunk of one. A chunk is as long as the model's largest context bucket, so its `context_length_estimate` is
    how long a prompt may stall others: 16 and 32 suit a CPU.

    It is ready once it has programs that fit every turn. A thread then loads the faster ones.
    """

    def __init__(
        self,
        model: "NeuronAutoModelForCausalLM",
        *,
        most_waiting: int = 256,
        seconds_per_turn: float = 60.0,
        tokens_per_turn: int = 256,
        draft: Any = None,
    ):
        self._drafter, self._tokens_per_turn = model.drafter(draft), tokens_per_turn
        self._model, self._most_waiting, self._seconds_per_turn = model, most_waiting, seconds_per_turn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._run, name="jx-neuron-engine", daemon=True)
        self._loader = Thread(target=self._load_faster, name="jx-neuron-loader")
        self._faster: Sequence[ProgramKey] = ()
        self._to_load = 0
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

    async def ready(self) -> None:
        """Waits until the programs are ready. Raises EngineFailed where they cannot be made."""
        while not self._ready and self._failure is None:
            await asyncio.sleep(READY_SECONDS)
        if self._failure is not None:
            raise self._failed()

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
            min(slots - scheduler.slots.free, slots) / slots,
            self._prompt_tokens,
            self._generation_tokens,
            scheduler.prefix_queries,
            scheduler.prefix_hits,
            scheduler.preemptions,
            self._to_load,
        )

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        deadline: float | None = None,
        prompt_logprobs: int | None = None,
        adapter: str | None = None,
    ) -> Stream:
        """Submits a prompt for `sampling.n` answers. To be called on the event loop.

        deadline:        seconds from now after which the stream raises DeadlineExceeded; None for no limit.
        prompt_logprobs: gives the likelihood of each token of the prompt, with this number of the most likely tokens.
        adapter:         the name of one of the model's adapters; None for none.

        Raises InputError where the model cannot take the request, QueueFull, ShuttingDown, and EngineFailed.
        """
        if self._closing:
            raise ShuttingDown("the server shuts down; send the request to another")
        if self._failure is not None or self._hangs:
            raise self._failed()
        request = self._model.request(prompt, sampling, prompt_logprobs, draft=self._drafter, adapter=adapter)
        if (waiting := self._waiting_with_another()) > self._most_waiting:
            raise QueueFull(waiting - 1, self._retry_after(waiting))
        stream = Stream(request, self.end)
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

    def end(self, stream: Stream, error: BaseException | None = None) -> None:
        """Ends a stream before its answers have ended, on the loop."""
        if not stream.ended:
            stream.cancelled = True
            self._receive([News(stream, (), error, True)])
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

    def _waiting_with_another(self) -> int:
        """How many requests wait once another is submitted: those whose predecessors' answers take all slots."""
        slots = self._model.engine.scheduler.batch_sizes[-1]
        before = accumulate((stream.unended for stream in self._live), initial=0)
        return sum(answers >= slots for answers in before)

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

    def _receive(self, news: Iterable[News]) -> None:
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
            self._send([News(stream, (), self._failed(), True) for stream in (*running, *self._arrived)])
        finally:
            self._turn_began = None
            if self._loader.ident is not None:
                self._loader.join()

    def _warm_up(self) -> None:
        engine, chunk = self._model.engine, self._model.buckets.context[-1]
        self._faster = engine.reserve(max(chunk, self._tokens_per_turn), drafter=self._drafter)
        self._to_load = len(self._faster)
        with suppress(JxNeuronError):  # a model without a tokenizer takes tokens alone
            _ = self._model.tokenizer  # transformers takes seconds to import, and the loop would wait
        self._loader.start()
        self._ready = True

    def _load_faster(self) -> None:
        try:
            for program in track(self._faster, "compiling", len(self._faster)):
                if self._stopping or not main_thread().is_alive():  # a compilation has to end before the process does
                    return
                self._model.runtime.load([program])
                self._to_load -= 1
        except Exception:  # the loaded ones serve
            LOG.exception("a program cannot be compiled")

    def _send(self, news: Sequence[News]) -> None:
        if news and self._loop is not None:
            with suppress(RuntimeError):  # of a loop that is closed
                self._loop.call_soon_threadsafe(self._receive, news)

    def _news(self, stream: Stream) -> News:
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
        return News(stream, events, error, ended)


def _close(stream: Stream) -> None:
    for answer in stream.answers:
        answer.ticket.close()
