"""jx-neuron plan: what fits where, and how fast."""

import gc
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jx_neuron.cli import options
from jx_neuron.cli.terminal import console, print_message

if TYPE_CHECKING:
    from jx_neuron.planning import Plan


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, checkpoint folder, .gguf file or hub id. Many checkpoints, such as "
            "facebook/opt-13b, are known by name, without a network.",
            show_default=False,
            autocompletion=options.models,
            callback=options.model,
        ),
    ],
    instance: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Instance type, such as trn1.32xlarge.",
            show_default="the smallest that holds it",
            autocompletion=options.instances,
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tensor-parallel degree.", show_default="the fastest"),
    ] = None,
    batch_size: options.BatchSize = 1,
    n_positions: options.NPositions = None,
    context_length_estimate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest prompt that is computed in one piece.",
            show_default="half of --n-positions",
        ),
    ] = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Apply the three rules of transformers-neuronx's first release; no padding."),
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Take activations from the lowered program (seconds), not an estimate.")
    ] = False,
    revision: options.Revision = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the plan into this .png, .pdf or .svg.", callback=options.path),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object; bytes and seconds.")] = False,
) -> None:
    """Find the instance and degree that a model fits, its memory per core, and its speed. Reads no weights.

    Times are estimates of a roofline model, fitted to published figures.

        jx-neuron plan facebook/opt-13b --dtype f16

        jx-neuron plan ./my-llama --instance trn1.32xlarge --tp 8 --batch-size 4 --plot plan.png
    """
    gc.disable()  # importing jax allocates much and frees next to nothing
    from jx_neuron.planning import plan
    from jx_neuron.runtime.deployment import config_of

    gc.enable()
    result = plan(
        config_of(model, revision=revision),
        instance,
        tp,
        batch_size=batch_size,
        n_positions=n_positions,
        context_length_estimate=context_length_estimate,
        amp=amp,
        quant=options.neuron_config(quant).quant,
        kv_cache_quant=options.kv_cache(kv_quant),
        strict=strict,
        lower=exact,
    )
    name = model.rstrip("/").removesuffix("/config.json").rsplit("/", 1)[-1]
    if plot is not None:
        from jx_neuron.planning.picture import draw

        draw(result, name, plot)
    if as_json:
        typer.echo(json.dumps({"model": model, **result.as_dict()}, indent=2))
    else:
        _print(result, name)
        if plot is not None:
            print_message(f"drawn into {plot}", err=True)


def _print(plan: "Plan", name: str) -> None:
    from rich.table import Table

    from jx_neuron.util.pages import gib

    out = console()

    def table(*columns: str) -> Table:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for n, column in enumerate(columns):
            grid.add_column(column, justify="left" if n == 0 else "right", header_style="dim", no_wrap=True)
        return grid

    room = plan.memory_per_core
    cache = f", cache in {plan.cache_dtype}" if plan.cache_dtype else ""
    out.print(
        f"[bold]{name}[/] ({plan.model_type}, {plan.size}, {plan.amp}{cache}) [bold]{'just ' * plan.tight}fits "
        f"{plan.instance} at tp {plan.tp_degree}[/]: {gib(plan.memory.total)} of {gib(room)} a core, "
        f"{_number(1e3 * plan.seconds_per_token)} ms a token.\n"
    )
    out.print(f"[bold]Memory of a core[/] at batch {plan.batch_size}, {plan.n_positions} positions")
    memory = table("", "GiB", "of core")
    for item, amount in plan.memory.items().items():
        how = {"activations": " (lowered)" if plan.activations_lowered else " (at most)"}
        allowed = " (allowance)" if item in ("code", "rings") else ""
        memory.add_row(item + how.get(item, allowed), f"{amount / 2**30:.2f}", f"{amount / room:.1%}")
    memory.add_row("total", f"{plan.memory.total / 2**30:.2f}", f"{plan.memory.total / room:.1%}", style="bold")
    out.print(memory, "")
    out.print(f"[bold]Degrees of {plan.instance}[/]")
    degrees = table("tp", "GiB a core", "ms a token")
    degrees.add_column("", overflow="fold")
    for degree in plan.degrees:
        speed = "" if degree.refusal else _number(1e3 * degree.seconds_per_token)
        why = "chosen" if degree.tp_degree == plan.tp_degree else _short(degree.refusal)
        style = "bold" if degree.tp_degree == plan.tp_degree else "dim" if degree.refusal else ""
        degrees.add_row(str(degree.tp_degree), f"{degree.memory.total / 2**30:.2f}", speed, why, style=style)
    out.print(degrees, "")
    out.print("[bold]Predicted speed[/] at full context")
    rates = table("batch", "ms a token", "tokens/s")
    for rate in plan.rates:
        style = "bold" if rate.batch_size == plan.batch_size else ""
        row = (str(rate.batch_size), _number(1e3 * rate.seconds_per_token), _number(rate.tokens_per_second))
        rates.add_row(*row, style=style)
    out.print(rates, "")
    out.print(
        f"First token of a {plan.context_length}-token prompt: {_number(1e3 * plan.seconds_to_first_token)} ms. "
        f"Largest batch: {plan.largest_batch}; longest context at batch {plan.batch_size}: {plan.largest_n_positions}. "
        f"Host memory to load: {gib(plan.host_bytes)}" + (f" of {gib(plan.host_memory)}." if plan.host_memory else ".")
    )
    for note in (*([plan.padding] if plan.padding else []), *plan.notes):
        out.print(f"Note: {note}.", style="yellow")
    out.print(
        "Times are estimates: on published figures they were not fitted to, half are within 5 %, all within 20 %.",
        style="dim",
    )


def _number(value: float) -> str:
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _short(refusal: str | None) -> str:
    if refusal is None:
        return ""
    return "does not fit" if refusal.startswith("each core") else refusal.split(", and")[0]
