"""The command line: jx-neuron."""

import sys
from typing import NoReturn

from jx_neuron.cli import interrupts


def main() -> NoReturn:
    """Runs the command line on the process's arguments and ends the process. Ctrl-C is handled before other imports."""
    interrupts.install()
    from jx_neuron.cli.app import run

    interrupts.leave(run(sys.argv[1:]))
