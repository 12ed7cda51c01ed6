"""jx-neuron info: what a model is, what it takes, and what runs it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from jx_neuron.cli import options
from jx_neuron.errors import InputError


def command(
    model: options.Model = None,
    demo: options.Demo = False,
    n_positions: options.NPositions = None,
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; sizes in bytes.")] = False,
) -> None:
    """Describe a model: its sizes, its memory, and the commands that run it. Reads headers, no weights.

    MODEL may also be a config.json, the name of a known checkpoint, a saved model, or a LoRA adapter of PEFT.

        jx-neuron info Qwen/Qwen3-0.6B

        jx-neuron info ./my-llama --json
    """
    if (model is None) != demo:
        raise InputError("name one model, or --demo")
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.checkpoint.lora import ADAPTER_CONFIG
    from jx_neuron.planning import description
    from jx_neuron.runtime import deployment

    name = str(demo_model() if model is None else model)
    path = Path(name).expanduser()
    facts: dict[str, Any] = {"model": name}
    if (path / ADAPTER_CONFIG).is_file():
        facts["adapter"] = description.adapter(path)
    else:
        if deployment.is_artifact(name):
            facts["saved"] = description.saved(path)
        elif path.is_dir() or path.suffix == ".gguf":
            facts["stored"] = description.stored(path)
        facts |= description.describe(deployment.config_of(name, revision=revision), n_positions)
    typer.echo(json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
    if lora := facts.get("adapter"):
        return [
            f"LoRA adapter   r {lora['r']}, alpha {lora['alpha']}, {lora['matrices']} matrices, "
            f"{decimal(lora['bytes'])}",
            f"base           {lora['base']}",
            f"runs by        jx-neuron sample {lora['base'] or 'BASE'} --adapter {facts['model']}",
        ]
    active = "" if facts["active_parameters"] == facts["parameters"] else f", {facts['active_parameters']:,} active"
    sizes = ", ".join(f"{title} {size}" for title, size in facts["sizes"].items())
    lines = [
        f"family         {facts['model_type']}",
        f"parameters     {facts['parameters']:,}{active}",
        f"config         {facts['layers']} layers, {sizes}, vocabulary {facts['vocabulary']}",
        f"positions      {facts['trained_positions'] or 'no limit'}",
    ]
    if (stored := facts.get("stored")) and stored["dtypes"]:
        dtypes = ", ".join(f"{decimal(size)} in {dtype}" for dtype, size in stored["dtypes"].items())
        lines.append(f"stored         {dtypes}" + (f" ({stored['method']})" if stored["method"] else ""))
    if saved := facts.get("saved"):
        lines.append(
            f"saved          {saved['programs']} programs in {saved['quant'] or saved['amp']} "
            f"at tp {saved['tp_degree']}, {saved['n_positions']} positions, "
            f"{'compiled' if saved['compiled'] else 'not compiled'} for "
            f"{saved['target'] or 'no target yet'}, {decimal(saved['weights'])} of weights"
        )
    lines += ["", f"{'':6}{'weights':>10}{'a token':>10}{'sequence':>10}  {'here':5} smallest instance"]
    for form, of in facts["forms"].items():
        first = next((f"{name} at tp {degree}" for name, degree in of["instances"].items()), "none")
        cells = "".join(f"{decimal(of[key]):>10}" for key in ("weights", "cache_of_a_token", "cache"))
        lines.append(f"{form:6}{cells}  {'yes' if of['fits_here'] else 'no':5} {first}")
    return [*lines, "", f"A sequence has {facts['n_positions']} positions. Any CPU with the memory runs it."]
