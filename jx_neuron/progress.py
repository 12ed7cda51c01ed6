"""Progress bars on standard error, shown only where somebody watches."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


def bar() -> Progress:
    """A bar on standard error that disappears when done; silent where standard error is no terminal, or a dumb one."""
    console = Console(stderr=True)
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
