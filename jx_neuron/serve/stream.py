"""The events of one request, as the event loop sees them, and the errors that end it."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jx_neuron.engine.generation import Request, RunningAnswer
from jx_neuron.engine.likelihood import Likelihood
from jx_neuron.engine.ticket import Event
from jx_neuron.errors import JxNeuronError


class QueueFull(JxNeuronError):  # noqa: N818
    """All slots are taken, and no more requests may wait.

    retry_after: seconds in which as many would begin at the recent rate, 1 to 60.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(
            f"all slots are taken, and {waiting} requests wait, the most that may; try again in {retry_after:.0f} s"
        )
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


class News(NamedTuple):
    """What a turn gave for a stream; `ended` once nothing follows."""

    stream: "Stream"
    events: Sequence[Event]
    error: BaseException | None
    ended: bool


class Stream:
    """The events of a request's answers, as an asynchronous iterator; it raises the request's error.

    timings: when the request went through its stages.
    unended: how many of its answers have not ended.
    """

    def __init__(self, request: Request, cancel: Callable[["Stream"], None]):
        self.request, self._cancel = request, cancel
        self.timings = Timings(time.perf_counter())
        self.unended = len(request.choices)
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
        self._cancel(self)

    def receive(self, events: Sequence[Event], error: BaseException | None, ended: bool) -> None:
        """Takes what a turn gave, on the loop."""
        if self._ended:
            return
        self._events.extend(events)
        self.unended -= sum(event.finish_reason is not None for event in events)
        self._error, self._ended = error, ended
        if ended and self.timer is not None:
            self.timer.cancel()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether no event will be added."""
        return self._ended
