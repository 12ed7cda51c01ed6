"""The settings of a server, and its limits."""

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """The names that a server goes by, its keys, and the limits of what it takes.

    names:           names of the model in requests; the first is the one in answers.
    api_keys:        one of them has to be in the Authorization header; none for a server that is open to all.
    metrics_prefix:  begins the names of metrics.
    most_bytes:      longest body of a request.
    most_answers:    most prompts × n of a request.
    most_logprobs:   most top_logprobs of a token.
    body_seconds:    how long a request's headers and body may take to arrive.
    write_seconds:   how long a reader may take nothing of a stream.
    idle_seconds:    how long a connection may stay open between requests.
    request_seconds: how long an answer may take; None for no limit.
    drain_seconds:   how long accepted requests may go on after SIGTERM.
    """

    names: Sequence[str]
    api_keys: Sequence[str] = ()
    metrics_prefix: str = "vllm:"
    most_bytes: int = 4 * MIB
    most_answers: int = 256
    most_logprobs: int = 20
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    idle_seconds: float = 75.0
    request_seconds: float | None = None
    drain_seconds: float = 30.0
