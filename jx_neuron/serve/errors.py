"""Errors in OpenAI's form: https://platform.openai.com/docs/guides/error-codes"""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from jx_neuron.errors import JxNeuronError, NonFiniteError
from jx_neuron.serve.stream import DeadlineExceeded, EngineFailed, QueueFull, ShuttingDown

LOG = logging.getLogger("jx_neuron.serve")
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An error of a request.

    status: the HTTP status.
    param:  the field at fault.
    code:   OpenAI's short name of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": dict(message=self.message, type=kind, param=self.param, code=self.code)}

    @property
    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The error of a request that has to be changed."""
    return APIError(400, message, param=param, code=code)


def api_error(error: BaseException) -> APIError:
    """The error of a request for any exception; a bug of this package is logged, and its details are not sent."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ValidationError):
        return _validation(error)
    if isinstance(error, QueueFull):
        return APIError(
            429, str(error), code="queue_full", headers={"Retry-After": str(max(1, round(error.retry_after)))}
        )
    if isinstance(error, ShuttingDown):
        return APIError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, DeadlineExceeded):
        return APIError(504, str(error), code="deadline_exceeded")
    if isinstance(error, EngineFailed):
        return APIError(503, str(error), code="engine_failed")
    if isinstance(error, NonFiniteError):
        return APIError(500, str(error), code="not_finite")
    if isinstance(error, JxNeuronError):
        return invalid(str(error))
    LOG.error("a request failed", exc_info=error)
    return APIError(500, "the server failed; its log says why")


def _is_tag(part: str | int) -> bool:
    """Whether a part of pydantic's location names a branch of a union, and no field."""
    return isinstance(part, str) and (part in ("str", "int") or not (part.islower() and part.isidentifier()))


def _validation(error: ValidationError) -> APIError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    *parts, last = first["loc"] or ("",)
    unknown = first["type"] == "extra_forbidden"
    where = ".".join([str(part) for part in parts if not _is_tag(part)] + [str(last)] * (unknown or not _is_tag(last)))
    if unknown:
        return invalid(f"{where} is no field that this server knows; leave it out", where, "unknown_parameter")
    return invalid(f"{where}: {first['msg']}" if where else first["msg"], where or None)
