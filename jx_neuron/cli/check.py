"""jx-neuron check: would neuronx-cc take these programs?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jx_neuron.cli import options
from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError, LoweringError

if TYPE_CHECKING:  # other commands import faster without it
    from jx_neuron.lowering.verify.checking import Violation


def command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR-or-HLO",
            help="A folder that compile or save() wrote, or the file of a serialized HloModuleProto.",
            show_default=False,
            callback=options.path,
        ),
    ],
    target: options.Target = None,
    lnc: Annotated[
        int | None,
        typer.Option(min=1, max=2, metavar="N", help="Physical cores to a logical one.", show_default="the target's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Check programs against the documented constraints of neuronx-cc.

    The exit status is 0 if all pass, also with warnings, 1 if one breaks a constraint, and 2 if there is none to check.

        jx-neuron check opt-13b-tp2 --target trn1
    """
    from jx_neuron.runtime.deployment import target_for

    target = target_for(target)
    violations_by_program = {name: _verify(name, hlo, target, lnc) for name, hlo in _programs(path)}
    refused = any(v.severity == "error" for violations in violations_by_program.values() for v in violations)
    if as_json:
        programs = {name: [v.as_dict() for v in violations] for name, violations in violations_by_program.items()}
        typer.echo(json.dumps(dict(target=target, passes=not refused, programs=programs)))
    else:
        for name, violations in violations_by_program.items():
            lines = [f"{name}:", *map(str, violations)] if violations else [f"{name}: passes on {target}"]
            print_message("\n  ".join(lines))
    if refused:
        raise typer.Exit(1)


def _verify(name: str, hlo: bytes, target: str, lnc: int | None) -> "list[Violation]":
    from jx_neuron.lowering.verify.checking import verify

    try:
        return verify(hlo, target, lnc=lnc)
    except LoweringError as error:
        raise LoweringError(f"{name}: {error}") from error


def _programs(path: Path) -> Iterator[tuple[str, bytes]]:
    from jx_neuron.artifact import folder as artifact

    if path.is_dir():
        saved = artifact.read(path)
        yield from ((program.name, saved.hlo(program.name)) for program in saved.manifest.programs)
    elif path.is_file():
        yield path.name, path.read_bytes()
    else:
        raise InputError(f"no such folder or file: {path}. Give what compile wrote, or the file of an HloModuleProto")
