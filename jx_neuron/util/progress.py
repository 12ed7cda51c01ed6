"""Long work: progress bars on standard error where it is a terminal, concurrent maps, and prefetching in threads."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
R = TypeVar("R")


class _BestEffortStream:
    """A stream, or None, whose write errors are ignored: a terminal may be gone, or lack the characters."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # None has no write
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def bar() -> Progress:
    """A progress bar on standard error, removed when done and disabled where that is no interactive terminal.

    Its errors never fail the work that it shows.
    """
    console = Console(file=cast(TextIO, _BestEffortStream(sys.stderr)))
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_interactive,
    )


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yields `items` under a progress bar labelled `description`."""
    with bar() as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


def map_concurrently(make: Callable[[T], Any], items: Sequence[T], description: str) -> None:
    """Calls `make` on each item in two threads, under a progress bar; much of the work is sequential."""
    if not items:
        return
    pool = ThreadPoolExecutor(2)
    try:
        for _ in track(pool.map(make, items), description, len(items)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields read(item) of each item in order; two threads read the next ones meanwhile."""
    reading = deque[Future[R]]()
    with ThreadPoolExecutor(2) as threads:
        for item in items:
            reading.append(threads.submit(read, item))
            if len(reading) > 2:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
