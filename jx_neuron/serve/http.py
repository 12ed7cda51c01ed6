"""Requests' bodies within limits, answers whole or as server-sent events, and clients that go away."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from jx_neuron.serve.errors import APIError, api_error, invalid
from jx_neuron.serve.fields import known
from jx_neuron.serve.served import Served
from jx_neuron.serve.settings import ServerSettings
from jx_neuron.util.pages import gc_paused

IGNORED_HEADER = "X-Ignored-Fields"
READ_ON = 4  # times the limit that is read of a body, so that its sender reads the error
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Chunks:
    """The server-sent events of answers; `close` cancels these."""

    events: AsyncIterator[str]
    close: Callable[[], None]


Handler = Callable[[Served, dict[str, Any]], Awaitable[dict[str, Any] | Chunks]]


def dumps(value: Any) -> str:
    """JSON without spaces; what is not finite has no place in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sse(value: Any, event: str | None = None) -> str:
    """A server-sent event."""
    return f"event: {event}\ndata: {dumps(value)}\n\n" if event else f"data: {dumps(value)}\n\n"


async def bytes_of(request: Request, settings: ServerSettings) -> bytes:
    """A request's body. Raises APIError: 408 where it does not arrive in time, 413 where it is too long."""
    too_large = APIError(413, f"the body is longer than {settings.most_bytes} bytes; send less", code="body_too_large")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > READ_ON * settings.most_bytes:
                    raise too_large
                if size <= settings.most_bytes:
                    chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_seconds:g} s"
        raise APIError(408, message, headers={"Connection": "close"}) from None
    if size > settings.most_bytes:
        raise too_large
    return b"".join(chunks)


async def body_of(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The JSON object of a request. Raises APIError, as `bytes_of` does, and where it is no JSON object."""
    body = await bytes_of(request, settings)
    try:
        with gc_paused():  # which takes as long as reading a long body
            fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid("the body is a JSON object of fields")
    return fields


def endpoint(served: Served, handle: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """A route that answers by `handle`: with a JSON object, or server-sent events."""

    async def answer(request: Request) -> Response:
        try:
            if served.draining:
                headers = {"Retry-After": "5", "Connection": "close"}
                raise APIError(503, "the server shuts down", code="shutting_down", headers=headers)
            body = await body_of(request, served.settings)
            fields, ignored = known(body, body.get("n"))
            headers = {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}
            result = await unless_disconnected(request.receive, handle(served, fields))
            if isinstance(result, dict):
                return Response(dumps(result), headers=headers, media_type="application/json")
            return EventStream(result, headers)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return api_error(error).response

    return answer


async def unless_disconnected(receive: Receive, work: Awaitable[Any]) -> Any:
    """Returns what `work` does. Cancels it, and raises ClientDisconnect, where the client goes away."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        raise ClientDisconnect
    finally:
        for task in (job, gone):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(job, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. A client that goes away cancels the answers."""

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, headers: dict[str, str]):
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of the response."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with suppress(ClientDisconnect):
                await unless_disconnected(receive, self._send_all(send))
        finally:
            self._chunks.close()

    async def _send_all(self, send: Send) -> None:
        async def write(chunk: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": more})

        try:
            async for chunk in self._chunks.events:
                await write(chunk)
        except Exception as error:
            await write(sse(api_error(error).body) + DONE)
        await write("", more=False)


def plain(value: Any, status: int = 200) -> JSONResponse:
    """A JSON response."""
    return JSONResponse(value, status)
