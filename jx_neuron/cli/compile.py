"""jx-neuron compile: a model in, an artifact out."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from jx_neuron.cli import interrupts, options
from jx_neuron.cli.terminal import console, fold, print_message
from jx_neuron.errors import CheckpointError, InputError

if TYPE_CHECKING:  # other commands import faster without it
    from jx_neuron.llm import NeuronAutoModelForCausalLM
    from jx_neuron.runtime.deployment import Deployment


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder, .gguf file or hub id; with --no-weights also a config.json, or the name of a "
            "checkpoint known without network, such as facebook/opt-30b.",
            show_default=False,
            autocompletion=options.models,
            callback=options.model,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to write.", show_default=False, callback=options.path
        ),
    ],
    tp: options.Tp = 1,
    batch_size: options.BatchSize = 1,
    n_positions: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest prompt and answer together; more than once, the token buckets.",
            show_default="2048, or what it was trained on",
        ),
    ] = None,
    context_length_estimate: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest prompt that is computed in one piece; more than once, the context buckets.",
            show_default="half of each token bucket",
        ),
    ] = None,
    speculation_length: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Also programs that verify drafts of N - 1 tokens, for sample --draft; more than once for several.",
            show_default=False,
        ),
    ] = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    target: options.Target = None,
    hlo_only: Annotated[
        bool, typer.Option("--hlo-only", help="Stop before neuronx-cc, which need not be installed.")
    ] = False,
    no_weights: Annotated[bool, typer.Option("--no-weights", help="Write programs only; read no weights.")] = False,
    ranks_per_host: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Cores of each host, where several share the model.", show_default="any number"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Programs compiled at once.", show_default="a quarter of the cores"),
    ] = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    adapters: options.Adapters = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Lower a model, check it, compile it with neuronx-cc, and write the programs and weights to a folder.

    If neuronx-cc would refuse a program, nothing is written. A folder with weights is all that is needed to run:
    jx-neuron sample DIR.

        jx-neuron compile ./opt-13b --tp 2 --dtype f16 --target trn1 -o opt-13b-tp2

        jx-neuron compile facebook/opt-30b --tp 8 --dtype f16 --hlo-only --no-weights -o opt-30b-hlo
    """
    from jx_neuron import artifact
    from jx_neuron.compiler import neuronx_cc
    from jx_neuron.runtime import deployment as deploy
    from jx_neuron.util import durable

    if no_weights and (adapter is not None or adapters):
        raise InputError("--adapter and --adapters change weights, and --no-weights keeps none; leave out either")
    if ranks_per_host is not None and tp % ranks_per_host:
        raise InputError(f"--ranks-per-host {ranks_per_host} is not legal at --tp {tp}; it takes a divisor of that")
    interrupts.at_end += [durable.abandon, neuronx_cc.abandon]
    began = time.perf_counter()
    artifact.check_replaceable(output)
    target = deploy.target_for(target)
    model_options: dict[str, Any] = dict(
        batch_size=batch_size,
        n_positions=_lengths(n_positions),
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, kv_quant, speculation_length=speculation_length),
        context_length_estimate=_lengths(context_length_estimate),
    )
    if no_weights:
        lowered = _from_config(model, revision, model_options)
    else:
        lowered = _from_checkpoint(
            model, revision, model_options | dict(adapter=adapter, adapters=options.adapters(adapters))
        )
    if not hlo_only:
        neuronx_cc.find_compiler()
    deployment = lowered.lowered()
    if hlo_only:
        deployment.check(target)
    else:
        deployment.compile(target, jobs)
    folder = lowered.save(output, sharded_weights=not no_weights, ranks_per_host=ranks_per_host)
    rows = [_row(program, deployment) for program in deployment.programs.values()]
    seconds = time.perf_counter() - began
    if as_json:
        typer.echo(json.dumps(dict(directory=str(folder), target=target, tp_degree=tp, programs=rows, seconds=seconds)))
        return
    _show(rows)
    print_message(f"{len(rows)} programs for {target} in {folder}, after {seconds:.0f} s")


def _lengths(lengths: list[int] | None) -> int | list[int] | None:
    return lengths[0] if lengths and len(lengths) == 1 else lengths or None


def _from_checkpoint(model: str, revision: str | None, model_options: dict[str, Any]) -> "NeuronAutoModelForCausalLM":
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    try:
        return NeuronAutoModelForCausalLM.from_pretrained(model, backend="host", revision=revision, **model_options)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nTo compile from the config alone, add --no-weights") from error


def _from_config(model: str, revision: str | None, model_options: dict[str, Any]) -> "NeuronAutoModelForCausalLM":
    from jx_neuron.llm import NeuronAutoModelForCausalLM
    from jx_neuron.runtime.deployment import config_of

    return NeuronAutoModelForCausalLM.from_config(config_of(model, revision=revision), **model_options)


def _row(program: Any, deployment: "Deployment") -> dict[str, Any]:
    from jx_neuron.lowering.hlo import proto

    hlo = deployment.hlo(program.name)
    module = proto.parse(hlo)
    return dict(
        name=program.name,
        instructions=len(proto.entry(module).instructions),
        collectives=sum(i.opcode in proto.COLLECTIVES for i in proto.instructions(module)),
        hlo_bytes=len(hlo),
        neff_bytes=len(deployment.neffs[program.name]()) if program.name in deployment.neffs else None,
        seconds=round(program.seconds, 2),
    )


def _show(rows: list[dict[str, Any]]) -> None:
    compiled = rows[0]["neff_bytes"] is not None
    titles = ("instructions", "collectives", "HLO", *(["NEFF"] if compiled else []), "seconds")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("program", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    cells = {row["name"]: _cells(row, compiled) for row in rows}
    for name, row in cells.items():
        table.add_row(name, *row)
    terminal = console()
    if Console(width=1000).measure(table).maximum <= terminal.width:
        terminal.print(table)
        return
    for name, row in cells.items():
        what = ", ".join(f"{cell} {title}" for cell, title in zip(row, titles, strict=True))
        typer.echo(fold(f"{name}\n  {what}", terminal.width))


def _cells(row: dict[str, Any], compiled: bool) -> list[str]:
    sizes = [decimal(row[key]) for key in ("hlo_bytes", *(["neff_bytes"] if compiled else []))]
    return [str(row["instructions"]), str(row["collectives"]), *sizes, f"{row['seconds']:.1f}"]
