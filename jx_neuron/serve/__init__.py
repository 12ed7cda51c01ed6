"""Serving a model to many callers at once: over HTTP, or on an event loop. HTTP takes the extra `serve`."""

from jx_neuron.util.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "application": "app",
        "async_engine": "AsyncEngine Stats",
        "stream": "DeadlineExceeded EngineFailed QueueFull ShuttingDown Stream Timings",
        "server": "Server raise_file_limit",
        "settings": "ServerSettings",
    },
)
