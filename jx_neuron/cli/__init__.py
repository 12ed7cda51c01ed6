"""The command line: jx-neuron."""

import sys
from typing import NoReturn

from jx_neuron.cli import interrupts


def main() -> NoReturn:
    """Runs the command line on the process's arguments and ends the process. All else is imported once Ctrl-C works."""
    interrupts.install()
    from jx_neuron.cli.app import run

    interrupts.leave(run(sys.argv[1:]))
