"""The arguments and options that commands share, and what a shell completes them with."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jx_neuron.cli.terminal import shortened
from jx_neuron.errors import InputError


def path(value: Any) -> Any:
    """`value`, once the system takes it for the path of something, or of nothing yet.

    Raises InputError for the home folder of an unknown user, OSError for a name that is too long or a folder that may
    not be entered.
    """
    try:
        if value is not None:
            Path(value).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except RuntimeError:
        raise InputError(f"{shortened(str(value))}: there is no such user, and so no home folder") from None
    return value


def model(value: Any) -> Any:
    """`value`, once it can name a checkpoint: the `path` of a folder, of a file, or of nothing, as a Hub id is.

    Raises InputError for devices and pipes, and for an empty name.
    """
    where = Path(path(value) or "").expanduser()
    if value == "" or (where.exists() and not (where.is_dir() or where.is_file())):
        raise InputError(f"{value!r} is no model; name a checkpoint folder, .gguf file or hub id")
    return value


def models() -> list[str]:
    """Checkpoints that are known by name."""
    from jx_neuron.models.known import KNOWN

    return list(KNOWN)


def _amps() -> list[str]:
    from jx_neuron.config import AMP

    return list(AMP)


def _targets() -> list[str]:
    from jx_neuron.lowering.verify.rules import TARGETS

    return list(TARGETS)


def instances() -> list[str]:
    """Instance types that plans are made for."""
    from jx_neuron.planning import INSTANCES

    return [instance.name for instance in INSTANCES]


Amp = Annotated[
    str, typer.Option(metavar="DTYPE", help="Dtype of weights and cache: f32, f16 or bf16.", autocompletion=_amps)
]
Tp = Annotated[int, typer.Option(min=1, metavar="N", help="Tensor-parallel degree.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at once.")]
NPositions = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Longest prompt and answer together.", show_default="2048, or what it was trained on"
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="inf2, trn1, trn1n, trn2 or trn3.",
        show_default="NEURON_CC_FLAGS', or this machine's, or trn1",
        autocompletion=_targets,
    ),
]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.")]
Demo = Annotated[bool, typer.Option("--demo", help="Use SmolLM2-135M-Instruct, fetched once (93 MB).")]
