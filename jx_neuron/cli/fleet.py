"""jx-neuron fleet: how many cores serve a load."""

import gc
import json
from typing import Annotated

import typer

from jx_neuron.cli import load as loads
from jx_neuron.cli import options
from jx_neuron.cli.terminal import console


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, checkpoint folder, .gguf file, hub id, or the name of a known checkpoint.",
            show_default=False,
            autocompletion=options.models,
            callback=options.model,
        ),
    ],
    rate: loads.Rate,
    prompt_tokens: loads.PromptTokens = None,
    answer_tokens: loads.AnswerTokens = None,
    shared_tokens: loads.SharedTokens = 0,
    lengths: loads.Lengths = None,
    first_token: Annotated[
        float, typer.Option(metavar="S", help="Seconds in which 95 of 100 requests have a first token.")
    ] = 1.0,
    between_tokens: Annotated[
        float, typer.Option(metavar="S", help="Seconds in which 95 of 100 tokens follow the one before.")
    ] = 0.1,
    instance: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Instance type or UltraServer, such as trn2.48xlarge or trn2-ultraserver.",
            show_default="all",
            autocompletion=options.groups,
        ),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cores of a replica.", show_default="any degree")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Answers of a replica at once.", show_default="any power of two to 64"),
    ] = None,
    n_positions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest prompt and answer together.", show_default="as the load needs"),
    ] = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The fleets as one JSON list; times in seconds.")] = False,
) -> None:
    """Find the number of cores, in replicas of a tensor-parallel group, that serve a load in time. Reads no weights.

    The server's scheduler is simulated with estimated step times, for each degree and batch size that may need the
    fewest cores. This takes seconds to a minute for an instance type.

        jx-neuron fleet facebook/opt-13b --rate 20 --instance trn2.48xlarge --dtype f16

        jx-neuron fleet ./my-llama --rate 5 --prompt-tokens 64-2048 --answer-tokens 256 --first-token 0.5
    """
    load = loads.load(rate, prompt_tokens, answer_tokens, shared_tokens, lengths)
    gc.disable()  # importing jax allocates much and frees next to nothing
    from jx_neuron.planning import Target, plan_fleet
    from jx_neuron.runtime.deployment import config_of

    gc.enable()
    fleets = plan_fleet(
        config_of(model, revision=revision),
        load,
        Target(first_token, between_tokens),
        instance=instance,
        tp_degree=tp,
        batch_size=batch_size,
        n_positions=n_positions,
        amp=amp,
        quant=options.neuron_config(quant).quant,
        kv_cache_quant=options.kv_cache(kv_quant),
    )
    if as_json:
        typer.echo(json.dumps([fleet.as_dict() for fleet in fleets], indent=2))
        return
    from rich.table import Table

    out, grid = console(), Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("instance", "cores", "replicas", "tp", "batch", "instances", "first token", "between"):
        left = column == "instance"
        grid.add_column(column, justify="left" if left else "right", header_style="dim", no_wrap=True)
    for fleet in fleets:
        service = fleet.service
        counts = (fleet.cores, fleet.replicas, fleet.tp_degree, fleet.batch_size, fleet.instances)
        late = (loads.seconds(service.first_token.p95), loads.seconds(service.between_tokens.p95))
        grid.add_row(fleet.instance, *map(str, counts), *late)
    out.print(grid, "")
    out.print(
        "95 of 100 latencies are at most the given ones. Step times are estimates; cores of different families are "
        "not alike.",
        style="dim",
    )
