"""jx-neuron models: the families, and the checkpoints that are known by name."""

import inspect
import json
from typing import Annotated, Any

import typer

from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError


def command(
    search: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Part of a family's or a checkpoint's name.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the supported families, and with TEXT the matching checkpoints that are known by name, with their sizes.

    A checkpoint of a listed family runs even if its name is not known. jx-neuron info describes one.

        jx-neuron models

        jx-neuron models qwen3 --json
    """
    families = _families(search.lower() if search else "")
    if not families:
        raise InputError(
            f"no family and no known checkpoint has {search!r} in its name; jx-neuron models lists families"
        )
    if as_json:
        typer.echo(json.dumps(families, indent=1))
        return
    for name, of in families.items():
        print_message(f"{name:18} {of['about']}" + ("" if search else f" [{len(of['checkpoints'])} known]"))
        for checkpoint, size in of["checkpoints"].items() if search else ():
            typer.echo(f"  {size / 1e9:8.2f} B  {checkpoint}")


def _families(search: str) -> dict[str, dict[str, Any]]:
    """Of each family that matches: what it is, its checkpoints that match, and where searched their parameters."""
    from jx_neuron.models import family, model_types
    from jx_neuron.models.known import KNOWN
    from jx_neuron.planning.outline import Outline

    counts: dict[str, int] = {}

    def size(config: dict[str, Any]) -> int:
        key = json.dumps(config, sort_keys=True)
        counts[key] = counts.get(key) or Outline.of(config).parameter_count
        return counts[key]

    families = {}
    for model_type in model_types():
        all_of = [name for name in KNOWN if KNOWN[name]["model_type"] == model_type]
        names = [name for name in all_of if search in name.lower()] or (all_of if search in model_type else [])
        if names or search in model_type:
            about = (inspect.getdoc(family(model_type)) or "").partition("\n")[0].rstrip(".")
            checkpoints = {name: size(KNOWN[name]) if search else None for name in names}
            families[model_type] = dict(about=about, checkpoints=checkpoints)
    return families
