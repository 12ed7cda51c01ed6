"""The HTTP server: uvicorn, with limits on connections that send nothing, and a drain on SIGTERM."""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from jx_neuron.errors import InputError
from jx_neuron.serve.served import Served
from jx_neuron.serve.settings import ServerSettings

LOG = logging.getLogger("jx_neuron.serve")
LINGER = 0.5  # seconds in which requests that are on their way still arrive
LEEWAY = 5.0  # seconds for the errors of requests that the drain has ended
HEADERS = 64 * 1024  # bytes of a request's headers
BACKLOG = 2048


def _protocol(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's protocol, with limits on how long a first request's headers may take to arrive, and how long a reader
    may take nothing."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timers = [self.loop.call_later(settings.body_seconds, self._close_unused)]

        def _close_unused(self) -> None:
            if not self.cycle:  # no headers have arrived
                self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._timers.append(self.loop.call_later(settings.write_seconds, self.transport.abort))

        def resume_writing(self) -> None:
            super().resume_writing()
            self._timers.pop().cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in self._timers:
                timer.cancel()
            super().connection_lost(exc)

    return Protocol


class Server(uvicorn.Server):
    """Serves an application of `jx_neuron.serve.app`. SIGTERM or SIGINT drains it: new requests get status 503, and
    accepted ones go on for `drain_seconds`; what then still runs gets an error. Then the port closes.

    ready: called with the port once it listens.
    again: called on a second SIGINT.
    """

    def __init__(
        self,
        application: Starlette,
        settings: ServerSettings,
        host: str,
        port: int,
        *,
        ready: Callable[[int], object] = lambda port: None,
        again: Callable[[], object] = lambda: None,
    ):
        super().__init__(
            uvicorn.Config(
                application,
                host=host,
                port=port,
                http=_protocol(settings),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=HEADERS,
                timeout_keep_alive=int(settings.idle_seconds),
                timeout_graceful_shutdown=int(settings.drain_seconds + LEEWAY),
                backlog=BACKLOG,
            )
        )
        self._served: Served = application.state.served
        self._drain_seconds, self._ready, self._again = settings.drain_seconds, ready, again
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's. Raises InputError where the port is in use or not allowed."""
        try:
            await super().startup(sockets)
        except SystemExit:
            where = f"{self.config.host}:{self.config.port}"
            raise InputError(f"{where} cannot be listened on; name another --host or --port") from None
        self._ready(self.servers[0].sockets[0].getsockname()[1])

    def drain(self, number: int = signal.SIGTERM) -> None:
        """Begins to end the server, by a signal. To be called on the event loop."""
        if self._draining is not None:
            if number == signal.SIGINT:
                self._again()
            return
        self._served.draining = True
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await asyncio.gather(self._served.engine.shutdown(self._drain_seconds), asyncio.sleep(LINGER))
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Has signals drain the server, in place of uvicorn's way, which ends the process by the signal."""
        loop = asyncio.get_running_loop()
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.drain, number)
        except (ValueError, RuntimeError):  # not the main thread
            LOG.debug("signals are not handled")
        yield


def raise_file_limit() -> None:
    """Lets the process have as many open connections as the system permits."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
