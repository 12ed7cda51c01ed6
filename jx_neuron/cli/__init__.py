"""The command line: jx-neuron."""

import os
import sys

import typer

from jx_neuron.cli import bench, check, compile, plan, sample
from jx_neuron.cli.terminal import Command, Group, plain_warnings, tell
from jx_neuron.errors import JxNeuronError

COMPLETING = "_JX_NEURON_COMPLETE"

app = typer.Typer(
    name="jx-neuron",
    cls=Group,
    help="Decoder language models in JAX, lowered to AWS Trainium and Inferentia, and run on any CPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (sample, compile, check, plan, bench):
    app.command(module.__name__.rpartition(".")[2], cls=Command)(module.command)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from jx_neuron import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line: status 2 for what the user can mend, in one message and no traceback."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent is no news here
    if COMPLETING in os.environ:
        os.environ["COLUMNS"] = "1000"  # typer folds what it says of an option, and shells take each line for a choice
    try:
        with plain_warnings():
            app(prog_name="jx-neuron")
    except JxNeuronError as error:
        tell(f"jx-neuron: {error}", err=True)
        sys.exit(2)
