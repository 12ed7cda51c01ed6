"""A server's replicas as deployments of Ray Serve: https://docs.ray.io/en/latest/serve/index.html

Ray's proxy answers requests whose replica dies with an error. So a router is between the two: it sends a request to
another replica as long as nothing of its answer was sent on.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jx_neuron.errors import InputError
from jx_neuron.llm import NeuronAutoModelForCausalLM
from jx_neuron.serve.application import app
from jx_neuron.serve.async_engine import AsyncEngine
from jx_neuron.serve.errors import APIError, api_error
from jx_neuron.serve.http import DONE, bytes_of, sse
from jx_neuron.serve.settings import ServerSettings
from jx_neuron.serve.sizes import SLOTS, name_of, sizes
from jx_neuron.serve.stream import EngineFailed, QueueFull

try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError
except ImportError as error:
    raise InputError(f"Ray Serve cannot be imported ({error}): pip install 'ray[serve]', the extra ray") from None

LOG = logging.getLogger("jx_neuron.serve")
CARRIED = frozenset(
    "type asgi http_version method scheme path raw_path query_string root_path headers".split()
)  # of a scope, what is plain data
MOST_REPLICAS = 3  # that a request is sent to, one after another
ROUTED = 10_000  # requests of a router; replicas have limits of their own


class Replica:
    """A model, and the server's application on it."""

    async def __init__(  # type: ignore[misc]
        self,
        path: str,
        settings: ServerSettings,
        engine: Mapping[str, Any],
        shape: tuple[int | None, int | None, list[int] | None],
        options: Mapping[str, Any],
    ):
        buckets = dict(sizes(path, *shape), n_positions=shape[1])
        model = NeuronAutoModelForCausalLM.from_pretrained(path, **buckets, **options)
        self._engine = AsyncEngine(model, **engine)
        self._app = app(model, self._engine, settings)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        await self._engine.ready()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of the application's answer to a request."""
        sent = asyncio.Queue[Message | None]()
        request = [dict(type="http.request", body=body, more_body=False)]

        async def receive() -> Message:
            return request.pop() if request else await asyncio.Future[Message]()  # a caller that goes away cancels

        job = asyncio.create_task(self._app(scope, receive, sent.put))
        job.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
            job.result()
        finally:
            job.cancel()

    def check_health(self) -> None:
        """Ray replaces the replica where this raises."""
        if not self._engine.healthy:
            raise EngineFailed("the engine failed, or hangs")

    async def __del__(self) -> None:
        """Ray awaits it once the replica's last request has ended."""
        await self._lifespan.__aexit__(None, None, None)


class Router:
    """Sends requests to replicas, and to another where one dies."""

    def __init__(self, replicas: Any, settings: ServerSettings):
        self._replicas, self._settings = replicas.options(stream=True), settings

    def __serve_build_asgi_app__(self) -> Starlette:
        """The application that Ray's proxy calls."""
        return Starlette(routes=[Route("/{path:path}", _Endpoint(self.answer))])

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of all routes. A replica that dies within a stream ends it with an error."""
        try:
            body = await bytes_of(Request(scope, receive), self._settings)
            await self._answer({name: scope[name] for name in scope if name in CARRIED}, body, send)
        except BackPressureError as error:
            await api_error(QueueFull(error.args[0], 1.0)).response(scope, receive, send)
        except (APIError, EngineFailed) as error:
            await api_error(error).response(scope, receive, send)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        for _ in range(MOST_REPLICAS):
            start: Message | None = None
            sent = False
            try:
                async for message in self._replicas.answer.remote(scope, body):
                    if start is None:
                        start = message  # is sent with what follows, so that another replica may answer until then
                        continue
                    if not sent:
                        await send(start)
                    sent = True
                    await send(message)
                return
            except RayActorError:
                LOG.warning("a replica died with a request")
            if sent:
                error = api_error(EngineFailed("the replica died before the answer had ended; send the request again"))
                await send(dict(type="http.response.body", body=(sse(error.body) + DONE).encode()))
                return
        raise EngineFailed(f"{MOST_REPLICAS} replicas died with this request")


class _Endpoint:
    """An ASGI application; Starlette takes a function for another kind of endpoint."""

    def __init__(self, answer: ASGIApp):
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


def application(
    model: str | Path,
    *,
    replicas: int | tuple[int, int] = 1,
    settings: ServerSettings | None = None,
    batch_size: int | None = None,
    n_positions: int | None = None,
    context_length_estimate: list[int] | None = None,
    most_waiting: int = 256,
    draft: Any = None,
    ray: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Application:
    """The server of `jx-neuron serve` for `ray.serve.run`.

    model, options: arguments of `from_pretrained`. Each replica loads the model, from a path that its host has.
    replicas:       their number, or the least and the most, of which Ray chooses by the requests that run and wait.
    settings:       names, keys and limits; by default the name is the model's. A replica that ends goes on with its
                    requests for `drain_seconds`.
    batch_size:     answers that a replica gives at a time; 8 by default. It takes twice as many requests.
    most_waiting:   requests that may wait for a replica; beyond, the answer is 429.
    draft:          that of `AsyncEngine`.
    ray:            options of the replicas' deployment that replace these, such as ray_actor_options.

    Raises InputError for a number of replicas that cannot be.
    """
    least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 0 <= least <= most or most < 1:
        raise InputError(f"replicas {replicas} is not legal; give a number from 1, or the least and the most")
    settings = settings or ServerSettings(names=(name_of(model),))
    slots = batch_size or SLOTS
    scaling = dict(min_replicas=least, max_replicas=most, target_ongoing_requests=slots)
    chosen = dict(
        max_ongoing_requests=2 * slots,
        max_queued_requests=most_waiting,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        **(dict(num_replicas=most) if least == most else dict(autoscaling_config=scaling)),
    )
    shape = batch_size, n_positions, context_length_estimate
    engine = dict(most_waiting=2 * slots, draft=draft)
    replica = serve.deployment(Replica, **chosen | dict(ray or {}))
    router = serve.deployment(serve.ingress()(Router), max_ongoing_requests=ROUTED, ray_actor_options=dict(num_cpus=0))
    return router.bind(replica.bind(str(model), settings, engine, shape, options), settings)


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """`application` for `serve run` and for Serve's config files, whose `args` are its arguments."""
    named = dict(arguments)
    if isinstance(settings := named.get("settings"), Mapping):
        named["settings"] = ServerSettings(**settings)
    return application(**named)
