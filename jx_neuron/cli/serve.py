"""jx-neuron serve: an HTTP server that OpenAI's clients know."""

import json
import os
import sys
from typing import Annotated

import typer

from jx_neuron.cli import interrupts, options
from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError

LOOPBACK = "127.0.0.1"
KEY = "JX_NEURON_API_KEY"
EXTRA = "starlette uvicorn prometheus-client llguidance"


def command(
    argument: options.Model = None,
    demo: options.Demo = False,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for every network.")
    ] = LOOPBACK,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 for a free one.")
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="The model's name in requests; more than once for several.", show_default="MODEL's"
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help=f"Key that requests must bear; more than once for several. {KEY} keeps it out of process lists.",
            show_default=f"${KEY}, or none",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Prompts answered at once.", show_default="8")
    ] = None,
    n_positions: options.NPositions = None,
    context_length_estimate: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of a prompt that a turn takes; more than once for several buckets.",
            show_default="16 and 32 on a CPU",
        ),
    ] = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    tp: options.Tp = 1,
    draft: options.Draft = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    adapters: options.Adapters = None,
    hosts: options.Hosts = None,
    host_rank: options.HostRank = None,
    most_waiting: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests that may wait for a slot; beyond, 429 with Retry-After.")
    ] = 256,
    most_answers: Annotated[int, typer.Option(min=1, metavar="N", help="Most prompts × n of a request.")] = 256,
    most_bytes: Annotated[int, typer.Option(min=1024, metavar="N", help="Longest body of a request.")] = 4 * 2**20,
    request_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="S", help="How long an answer may take.", show_default="no limit"),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, metavar="S", help="How long running requests may go on after SIGTERM or Ctrl-C.")
    ] = 30.0,
    metrics_prefix: Annotated[str, typer.Option(metavar="TEXT", help="Begins the names of metrics.")] = "vllm:",
    as_json: Annotated[bool, typer.Option("--json", help="Print where it listens as one JSON object.")] = False,
) -> None:
    """Serve a model over HTTP to OpenAI's clients.

    Routes: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models, /tokenize, /detokenize, /health, /version
    and /metrics. docs/serving.md has the fields of requests, limits, tuning and security. It takes the extra serve.

        jx-neuron serve --demo

        jx-neuron serve ./my-llama --batch-size 16 --n-positions 4096 --port 8080
    """
    if demo == (argument is not None):
        raise InputError("name a checkpoint folder, .gguf file or hub id, or use --demo alone")
    if not metrics_prefix.isascii() or not metrics_prefix.replace(":", "_").isidentifier():
        raise InputError(f"--metrics-prefix {metrics_prefix!r} is not legal; it takes letters, digits, _ and :")
    keys = api_key or [key for key in [os.environ.get(KEY, "")] if key]
    if not all(keys):
        raise InputError("--api-key is empty; give a key, or leave it out")
    from jx_neuron import distributed
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    try:
        from jx_neuron.serve import AsyncEngine, Server, ServerSettings, app, raise_file_limit
        from jx_neuron.serve.sizes import name_of, sizes
    except ImportError as error:
        raise InputError(f"the server cannot be imported ({error}): pip install {EXTRA}") from None
    options.join(hosts, host_rank, tp)
    path = demo_model() if demo else options.model(argument)
    model = NeuronAutoModelForCausalLM.from_pretrained(
        path,
        **sizes(path, batch_size, n_positions, context_length_estimate),
        n_positions=n_positions,
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, kv_quant),
        revision=revision,
        adapter=adapter,
        adapters=options.adapters(adapters),
    )
    drafter = options.drafter(draft, model)
    distributed.follow(model, *([drafter] if isinstance(drafter, NeuronAutoModelForCausalLM) else []))
    settings = ServerSettings(
        names=served_model_name or [name_of(path)],
        api_keys=keys,
        metrics_prefix=metrics_prefix,
        most_bytes=most_bytes,
        most_answers=most_answers,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
    raise_file_limit()

    def ready(port: int) -> None:
        _announce(settings.names[0], host, port, bool(keys), as_json)

    engine = AsyncEngine(model, most_waiting=most_waiting, draft=drafter)
    application = app(model, engine, settings)
    Server(application, settings, host, port, ready=ready, again=lambda: interrupts.leave(interrupts.STATUS)).run()


def _announce(name: str, host: str, port: int, keyed: bool, as_json: bool) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if as_json:
        typer.echo(json.dumps(dict(url=url, model=name)))
    else:
        key = f" -H 'Authorization: Bearer '${KEY}" if keyed else ""
        message = json.dumps({"messages": [{"role": "user", "content": "Why is the sky blue?"}]})
        typer.echo(f"{name} listens on {url}. Try:\n  curl {url}/v1/chat/completions{key} -d '{message}'")
    sys.stdout.flush()
    if host not in (LOOPBACK, "localhost", "::1") and not keyed:
        print_message(f"Anyone who can reach {host} can use it; --api-key asks them for a key.", err=True)
