"""The ASGI application: routes, and who may use them."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jx_neuron import __version__
from jx_neuron.serve.async_engine import AsyncEngine
from jx_neuron.serve.chat import chat_completions
from jx_neuron.serve.completions import completions
from jx_neuron.serve.errors import APIError, api_error
from jx_neuron.serve.http import endpoint, plain
from jx_neuron.serve.responses import responses
from jx_neuron.serve.served import Served
from jx_neuron.serve.settings import ServerSettings
from jx_neuron.serve.tokens import detokenize, tokenize, tokenizer_info

if TYPE_CHECKING:
    from jx_neuron.llm.model import NeuronAutoModelForCausalLM

OPEN = frozenset({"/health", "/ping", "/version", "/metrics"})
"""Paths that take no key."""
POSTED = {
    "/v1/completions": completions,
    "/v1/chat/completions": chat_completions,
    "/v1/responses": responses,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Keys:
    """Refuses requests without one of the keys, except for the paths in OPEN."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]):
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._permits(scope):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            await APIError(401, message, code="invalid_api_key").response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _permits(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = header.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), one) for one in self._keys]  # each, so that time tells nothing
        return kind.lower() == b"bearer" and any(matches)


def app(model: "NeuronAutoModelForCausalLM", engine: AsyncEngine, settings: ServerSettings) -> Starlette:
    """The application of a server; its lifespan starts and ends the engine. `app.state.served` is the Served."""
    served = Served(model, engine, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        await asyncio.to_thread(served.load_tokenizer)
        yield
        served.draining = True
        await engine.shutdown(0)

    async def models(_: Request) -> Response:
        card = dict(object="model", created=served.created, owned_by="jx-neuron", root=served.name, parent=None)
        data = [dict(card, id=name, max_model_len=served.capacity) for name in settings.names]
        data += [dict(one, id=name, parent=served.name) for name in served.adapters for one in data[:1]]
        return plain(dict(object="list", data=data))

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        served.require_name(name)
        return plain(
            dict(id=name, object="model", created=served.created, owned_by="jx-neuron", max_model_len=served.capacity)
        )

    async def health(_: Request) -> Response:
        return Response(status_code=200 if engine.healthy and not served.draining else 503)

    async def version(_: Request) -> Response:
        return plain(dict(version=__version__))

    async def metrics(_: Request) -> Response:
        return Response(served.metrics.text(), headers={"Content-Type": PROMETHEUS})

    async def info(_: Request) -> Response:
        return plain(tokenizer_info(served))

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return APIError(error.status_code, error.detail, headers=error.headers).response

    async def failed(_: Request, error: Exception) -> Response:
        return api_error(error).response

    gets = {
        "/v1/models": models,
        "/v1/models/{name:path}": one_model,
        "/health": health,
        "/ping": health,
        "/version": version,
        "/metrics": metrics,
        "/tokenizer_info": info,
    }
    routes = [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
    routes += [Route(path, endpoint(served, handle), methods=["POST"]) for path, handle in POSTED.items()]
    middleware = [Middleware(Keys, keys=tuple(settings.api_keys))] if settings.api_keys else []
    handlers = {HTTPException: http_error, APIError: failed, Exception: failed}
    application = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    application.state.served = served
    return application
