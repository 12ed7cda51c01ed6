"""The command line: jx-neuron."""

import os
import sys

import typer

from jx_neuron.cli import bench, check, compile, plan, sample
from jx_neuron.errors import JxNeuronError

app = typer.Typer(
    name="jx-neuron",
    help="Decoder language models in JAX, lowered to AWS Trainium and Inferentia, and run on any CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("sample")(sample.command)
app.command("compile")(compile.command)
app.command("check")(check.command)
app.command("plan")(plan.command)
app.command("bench")(bench.command)


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
    try:
        app()
    except JxNeuronError as error:
        typer.echo(f"jx-neuron: {error}", err=True)
        sys.exit(2)
