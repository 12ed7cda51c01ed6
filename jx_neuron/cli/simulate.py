"""jx-neuron simulate: what a server on this machine would give under a load."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from jx_neuron.cli import load as loads
from jx_neuron.cli import options
from jx_neuron.cli.terminal import console
from jx_neuron.errors import InputError


def command(
    model: options.Model = None,
    demo: options.Demo = False,
    rate: loads.Rate = 1.0,
    prompt_tokens: loads.PromptTokens = None,
    answer_tokens: loads.AnswerTokens = None,
    shared_tokens: loads.SharedTokens = 0,
    lengths: loads.Lengths = None,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests of the simulation.")] = 400,
    replicas: Annotated[int, typer.Option(min=1, metavar="N", help="Servers, each on a machine like this.")] = 1,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="How often each program is timed.")] = 5,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Prompts answered at once.", show_default="8")
    ] = None,
    n_positions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest prompt and answer together.", show_default="as the load needs"),
    ] = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    tp: options.Tp = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; times in seconds.")] = False,
) -> None:
    """Simulate `serve` under a load, with the step times of this machine, which are measured first.

    The server's scheduler runs on a simulated clock: hours of load take seconds. Run nothing else at the same time.
    docs/planning.md compares the result with a server.

        jx-neuron simulate --demo --rate 2 --prompt-tokens 20-200 --answer-tokens 64

        jx-neuron simulate ./my-llama --rate 5 --lengths seen.jsonl --json
    """
    if demo == (model is not None):
        raise InputError("name one model: a checkpoint folder, .gguf file or hub id, or --demo")
    load = loads.load(rate, prompt_tokens, answer_tokens, shared_tokens, lengths)
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm import NeuronAutoModelForCausalLM
    from jx_neuron.planning import Measured, simulate
    from jx_neuron.serve.sizes import sizes

    path = demo_model() if model is None else model
    positions = load.longest if n_positions is None else n_positions
    causal_lm = NeuronAutoModelForCausalLM.from_pretrained(
        path,
        **sizes(path, batch_size, positions, None),
        n_positions=positions,
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, kv_quant),
    ).to_neuron()
    service = simulate(Measured(causal_lm, runs), load, requests=requests, replicas=replicas)
    if as_json:
        typer.echo(json.dumps(dict(rate=rate, replicas=replicas, **asdict(service)), indent=2))
        return
    out = console()
    out.print(loads.latencies(service), "")
    refused = f" {service.refused} requests are refused." if service.refused else ""
    out.print(
        f"{service.requests_per_second:.3g} requests/s of {rate:g} are answered, {service.tokens_per_second:.3g} "
        f"tokens/s; steps run {service.busy:.0%} of the time.{refused}"
    )
