"""The answers to a request, as they are made: text up to a stop string, and what was used."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jx_neuron.engine.options import SamplingParams
from jx_neuron.engine.stopping import Detokenizer, StopFilter
from jx_neuron.engine.ticket import Event
from jx_neuron.serve.protocol import Sampling
from jx_neuron.serve.served import Served
from jx_neuron.serve.stream import Stream

BUFFERED = 64  # events of a request with several prompts that wait for its reader


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    choice:      index of the answer in the response.
    text:        the text that is certain not to begin a stop string.
    stop_reason: the stop string or stop token that ended the answer; None for the model's own end.
    """

    choice: int
    text: str
    event: Event
    finish_reason: str | None
    stop_reason: str | int | None = None


class Answers:
    """The answers to prompts with the same sampling parameters, as an asynchronous iterator of pieces; `close` cancels
    the unfinished ones.

    Raises what `AsyncEngine.submit` does, with none of the prompts submitted.
    """

    def __init__(
        self,
        served: Served,
        prompts: Sequence[list[int]],
        samplings: Sequence[SamplingParams],
        *,
        prompt_logprobs: int | None = None,
        request: Sampling,
    ):
        self.served, self.prompts = served, prompts
        self.n, self._sampling = samplings[0].n, samplings[0]
        self._stop_tokens = request.stop_token_ids or ()
        self.completion_tokens = 0
        self.streams: list[Stream] = []
        strings = [self._sampling.stop] if isinstance(self._sampling.stop, str) else list(self._sampling.stop or ())
        include = bool(request.include_stop_str_in_output)
        self._filters = [StopFilter(strings, include) for _ in range(len(prompts) * self.n)]
        self._detokenizers = (
            None
            if request.skip_special_tokens is not False
            else [
                Detokenizer(served.tokenizer, prompt, skip_special_tokens=False)
                for prompt in prompts
                for _ in range(self.n)
            ]
        )
        self._counts, self._running = [0] * len(self._filters), [self.n] * len(prompts)
        self._seconds: list[float | None] = [None] * len(self._filters)
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                deadline = served.settings.request_seconds
                stream = served.engine.submit(
                    prompt,
                    sampling,
                    deadline=deadline,
                    prompt_logprobs=prompt_logprobs,
                    adapter=served.adapter(request.model),
                )
                self.streams.append(stream)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancels the answers that have not ended."""
        for stream in self.streams:
            stream.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        if len(self.streams) == 1:
            async for event in self.streams[0]:
                yield self._piece(0, event)
            return
        events: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue(BUFFERED)

        async def pump(number: int, stream: Stream) -> None:
            try:
                async for event in stream:
                    await events.put((number, event))
                await events.put(None)
            except Exception as error:
                await events.put(error)

        pumps = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(self.streams)]
        try:
            live = len(pumps)
            while live:
                match await events.get():
                    case None:
                        live -= 1
                    case BaseException() as error:
                        raise error
                    case number, event:
                        yield self._piece(number, event)
        finally:
            for task in pumps:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*pumps, return_exceptions=True)

    def _piece(self, number: int, event: Event) -> Piece:
        choice = number * self.n + event.answer
        self.completion_tokens += 1
        self._counts[choice] += 1
        reason, last = event.finish_reason, event.finish_reason is not None
        text, stop_reason = event.text or "", None
        if self._detokenizers is not None:
            text = self._detokenizers[choice].add(event.token, last=last)
        if reason == "stop" and event.token in self._stop_tokens:
            stop_reason, text = event.token, text.removesuffix(self.served.token_text(event.token))
        text, string = self._filters[choice].add(text, last=last)
        metrics, before = self.served.metrics, self._seconds[choice]
        if before is not None:
            metrics.gap(event.seconds - before)
        self._seconds[choice] = event.seconds
        if last:
            metrics.ended(reason or "stop", self._counts[choice])
            self._running[number] -= 1
            if not self._running[number]:
                metrics.finished(
                    self.streams[number].timings,
                    len(self.prompts[number]),
                    self._counts[choice],
                    self.n,
                    self._sampling.max_tokens,
                )
        return Piece(choice, text, event, reason, string if string is not None else stop_reason)

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens so far, in OpenAI's form."""
        prompt_tokens = sum(map(len, self.prompts))
        return dict(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt_tokens + self.completion_tokens,
            prompt_tokens_details=dict(cached_tokens=sum(stream.timings.cached_tokens for stream in self.streams)),
        )
