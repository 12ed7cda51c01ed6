"""The options of commands that take a load, and what they print of a service."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jx_neuron.cli import options
from jx_neuron.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from jx_neuron.planning import Load, Service

Rate = Annotated[float, typer.Option(metavar="R", help="Requests a second, which arrive independently of each other.")]
PromptTokens = Annotated[
    str | None,
    typer.Option(metavar="N|N-M", help="Tokens of a prompt: a number, or evenly from N to M.", show_default="512"),
]
AnswerTokens = Annotated[
    str | None,
    typer.Option(metavar="N|N-M", help="Tokens of an answer: a number or a range.", show_default="128"),
]
SharedTokens = Annotated[
    int, typer.Option(min=0, metavar="N", help="Tokens of a prefix that all prompts have before their own.")
]
Lengths = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Lengths of requests seen, instead: lines of {"prompt_tokens": N, "answer_tokens": M}.',
        callback=options.path,
        show_default=False,
    ),
]


def load(rate: float, prompt: str | None, answer: str | None, shared: int, lengths: Path | None) -> "Load":
    """The load of these options. Raises InputError for lengths that are none."""
    from jx_neuron.planning import Load

    if lengths is None:
        sizes = _lengths("--prompt-tokens", prompt or "512"), _lengths("--answer-tokens", answer or "128")
        return Load(rate, *sizes, shared)
    if prompt or answer:
        raise InputError("--lengths has the tokens of prompts and answers; leave out --prompt-tokens, --answer-tokens")
    return Load.of_file(lengths, rate, shared)


def _lengths(name: str, text: str) -> int | tuple[int, int]:
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"{name} {text!r} is no length; give tokens as 512, or from 64-1024")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def seconds(value: float) -> str:
    """Seconds in words of three digits."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def latencies(service: "Service") -> "Table":
    """A table of a service's latencies."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for n, column in enumerate(("", "mean", "p50", "p95", "p99")):
        grid.add_column(column, justify="left" if n == 0 else "right", header_style="dim", no_wrap=True)
    for name, spread in (
        ("first token", service.first_token),
        ("between tokens", service.between_tokens),
        ("whole answer", service.whole),
    ):
        grid.add_row(name, *map(seconds, (spread.mean, spread.p50, spread.p95, spread.p99)))
    return grid
