"""Long work: progress bars on standard error, shown only where somebody watches, and work done ahead in threads."""

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


class _Courtesy:
    """A stream, or None, on which what cannot be written is left out: a terminal may be gone, or lack the signs."""

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
    """A bar on standard error that disappears when done; silent where standard error is no terminal, or a dumb one.

    It never fails the work that it shows.
    """
    console = Console(file=cast(TextIO, _Courtesy(sys.stderr)))
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
    """Yields `items` under a bar that says `description`."""
    with bar() as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


def map_concurrently(make: Callable[[T], Any], items: Sequence[T], description: str) -> None:
    """make(one) of each of `wanted` under a bar, two at a time, which largely sequential work leaves room for."""
    if not items:
        return
    pool = ThreadPoolExecutor(2)
    try:
        for _ in track(pool.map(make, items), description, len(items)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """read(item) of each in turn; two threads read the next ones while one is in use."""
    reading = deque[Future[R]]()
    with ThreadPoolExecutor(2) as threads:
        for item in items:
            reading.append(threads.submit(read, item))
            if len(reading) > 2:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
