"""The application, and the one place where errors become messages and exit statuses."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

import typer

from jx_neuron.cli import (
    bench,
    chat,
    check,
    compile,
    fleet,
    info,
    interrupts,
    models,
    plan,
    quantize,
    sample,
    score,
    serve,
    simulate,
)
from jx_neuron.cli.terminal import Command, Group, Output, plain_warnings, print_message, shortened, show_usage_error
from jx_neuron.errors import InputError, JxNeuronError
from jx_neuron.util import temporary

interrupts.at_end.append(temporary.abandon)

NAME = "jx-neuron"
COMPLETING = "_JX_NEURON_COMPLETE"
CLOSED_PIPE = 141  # 128 + SIGPIPE, a shell's status of a process whose reader is gone
_UsageError: Any = typer.BadParameter.__base__  # click's, or the copy in newer typers

app = typer.Typer(
    name=NAME,
    cls=Group,
    help="Decoder language models in JAX, lowered to AWS Trainium and Inferentia, and run on any CPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "Run a model": (sample, chat, serve),
    "Choose one": (models, info),
    "Measure and shrink one": (score, bench, quantize),
    "For Trainium and Inferentia": (plan, fleet, simulate, compile, check),
}
for title, modules in COMMANDS.items():
    for module in modules:
        app.command(module.__name__.rpartition(".")[2], cls=Command, rich_help_panel=title)(module.command)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from jx_neuron import __version__

        typer.echo(__version__)
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its status: 2, with one message and no traceback, for users' errors.

    Raises KeyboardInterrupt.
    """
    try:
        _check_streams()
        with plain_warnings(), redirect_stdout(Output(sys.stdout)):
            status = _run(arguments)
            sys.stdout.flush()
            return status
    except Exception as error:
        if interrupts.received.is_set():
            raise KeyboardInterrupt from error
        return _status(error)


def _run(arguments: Sequence[str]) -> int:
    if COMPLETING in os.environ:
        os.environ["COLUMNS"] = "1000"  # typer wraps descriptions of options, and shells read each line as a completion
        with suppress(SystemExit):
            app(prog_name=NAME)
        return 0
    _check_text(arguments)
    command = typer.main.get_command(app)
    try:
        with command.make_context(NAME, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    return 0


def _status(error: Exception) -> int:
    """Prints the error, and returns its exit status."""
    try:
        if isinstance(error, BrokenPipeError) and error.filename == Output.NAME:
            return CLOSED_PIPE
        if isinstance(error, OSError):
            where = f"{shortened(str(error.filename))}: " if error.filename else ""
            print_message(f"{NAME}: {where}{error.strerror or error}", err=True)
        elif isinstance(error, JxNeuronError):
            print_message(f"{NAME}: {error}", err=True)
        elif isinstance(error, UnicodeEncodeError):
            print_message(
                f"{NAME}: standard output takes {error.encoding} and not {error.object[error.start : error.end]!r}; "
                "set PYTHONIOENCODING=utf-8",
                err=True,
            )
        elif isinstance(error, MemoryError):
            print_message(
                f"{NAME}: this machine has too little memory for it ({error or 'no more is given'})", err=True
            )
        elif isinstance(error, _UsageError):
            show_usage_error(error)
        else:
            traceback.print_exception(error)
            return 1
    except OSError:  # standard error is closed
        pass
    return 2


def _check_streams() -> None:
    """Raises InputError where there is no standard output; standard error may be closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise InputError("standard output is closed; send it to a file, or to /dev/null")


def _check_text(arguments: Sequence[str]) -> None:
    for n, argument in enumerate(arguments, 1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = shortened(argument).encode(errors="replace").decode()
            raise InputError(f"argument {n}, {shown!r}, is not UTF-8 text") from None
        if "\0" in argument:
            raise InputError(f"argument {n}, {shortened(argument)!r}, holds a NUL character; leave it out")
