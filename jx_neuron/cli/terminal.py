"""Help and messages that fit the terminal, however narrow."""

import errno
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from jx_neuron.cli import hints

WHOLE: dict[str, Any] = dict(break_long_words=False, break_on_hyphens=False)
NARROW = 60  # terminal columns below which help has one column of text, not two


def columns(stream: IO[str]) -> int:
    """The width of the terminal that `stream` writes to; where it is no terminal, COLUMNS or 80."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raises the error; rich itself would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), Output.NAME)


def console() -> Console:
    """A console of standard output with the width of its terminal; rich assumes 80 columns of dumb terminals."""
    return _Console(width=columns(sys.stdout), height=25, highlight=False)


def fold(text: str, width: int, indent: str = "") -> str:
    """Wraps `text` at whole words into lines of at most `width`; continued lines keep their indentation."""
    lines = [line for line in text.splitlines() for line in _fold(indent + line, width)]
    return "\n".join(lines)


def _fold(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, width, subsequent_indent=indent, **WHOLE) or [""]


def _fold_command(command: str, width: int, indent: str) -> list[str]:
    """Wraps a shell command; a quoted text is one word."""
    lines = [indent]
    for word in re.findall(r"'[^']*'|\"[^\"]*\"|\S+", command):
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) > width:
            lines.append(indent)
        lines[-1] += (" " if lines[-1].strip() else "") + word
    return lines


def print_message(text: str, *, err: bool = False) -> None:
    """Prints a message, wrapped in a terminal and on one line otherwise.

    Errors of writing to standard error are ignored.
    """
    with suppress(OSError) if err else nullcontext():
        typer.echo(_fitted(text, sys.stderr if err else sys.stdout), err=err)


def shortened(text: str, most: int = 100) -> str:
    """`text`, without its middle where it is longer than `most`.

    >>> shortened("abcdefghij", 6)
    'abc…hij'
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) :]}"


def show_usage_error(error: Any) -> None:
    """Prints click's error about an argument as `print_message` does, and suggests options for a misspelt one."""
    message = error.format_message()
    if getattr(error, "possibilities", None) is not None and error.ctx is not None:
        hint = hints.for_option(error.ctx.command, error.ctx.find_root().command, error.option_name)
        message = f"{error.message.rstrip('.')}. {hint}" if hint else error.message.rstrip(".")
    text = _fitted(f"Error: {message}", sys.stderr).removeprefix("Error: ")
    error.format_message = lambda: text
    error.show()


def _fitted(text: str, stream: IO[str]) -> str:
    return fold(text, columns(stream)) if stream.isatty() else text


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows each UserWarning as a plain message, without its line of source."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        text = f"jx-neuron: {message}"
        return _fitted(text, sys.stderr) + "\n" if category is UserWarning else usual(message, category, *where, **line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def reserve_stdout() -> None:
    """Gives standard output to this package alone: what libraries in C++ print there goes to standard error."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    own.reconfigure(line_buffering=own.isatty())
    os.dup2(2, 1)
    sys.stdout = Output(own)


class Output:
    """Standard output, whose errors name it."""

    NAME = "standard output"

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream."""
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        """As of any stream."""
        with self._named():
            self._stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self.NAME
            raise


class Help(typer.Context.formatter_class):  # type: ignore[valid-type, misc]
    """Help that fits the terminal: words stay whole, and a narrow terminal shows descriptions below names."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None):
        super().__init__(indent_increment, min(columns(sys.stdout), max_width or 80) if width is None else width)

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The usage line."""
        words = f"{prefix or 'Usage: '}{prog} {args}"
        self.write("\n".join(textwrap.wrap(words, self.width, subsequent_indent="  ", **WHOLE)) + "\n")

    def write_text(self, text: str) -> None:
        """Paragraphs; a command is wrapped with a backslash at line ends."""
        indent = " " * self.current_indent
        for n, paragraph in enumerate(text.split("\n\n")):
            words = " ".join(paragraph.split())
            if words.startswith("jx-neuron "):
                folded = " \\\n".join(_fold_command(words, self.width - 2, indent + "  "))
            else:
                folded = fold(words, self.width, indent)
            self.write(("\n" if n else "") + folded + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Names and their descriptions."""
        rows = [(name.partition(" <")[0], text) for name, text in rows]  # newer typers add an argument's type
        below = self.width < NARROW
        column = 6 if below else self.current_indent + min(col_max, max(len(name) for name, _ in rows)) + col_spacing
        for name, text in rows:
            start = " " * self.current_indent + name
            lines = fold(" ".join(text.split()), self.width, " " * column).splitlines()
            if lines and not below and len(start) + col_spacing <= column:
                lines[0] = start + lines[0][len(start) :]
            else:
                lines.insert(0, start)
            self.write("\n".join(lines) + "\n")


class _Context(TyperCommand.context_class):  # type: ignore[valid-type, misc]
    formatter_class = Help


class Command(TyperCommand):
    """A command with this help."""

    context_class = _Context

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments of the usage line, by their names."""
        return ["[OPTIONS]", *(str(p.metavar) for p in self.params if p.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Options by group, each with its short name and the first of its long ones."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            names, text = record
            for alias in [name for name in parameter.opts if name.startswith("--")][1:]:
                names = names.replace(f", {alias}", "")
            argument = parameter.param_type_name == "argument"
            title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
            sections.setdefault(title, []).append((names, text))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class Group(TyperGroup):
    """Commands with this help."""

    context_class = _Context

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begins with. Raises click's UsageError, with what to type instead."""
        if args[0] not in self.commands and not args[0].startswith("-") and (hint := hints.for_command(args)):
            ctx.fail(f"No such command {shortened(args[0])!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Commands by group, each with the first paragraph of its help."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            title = getattr(command, "rich_help_panel", None) or "Commands"
            sections.setdefault(title, []).append((name, (command.help or "").partition("\n\n")[0]))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
