"""jx-neuron quantize: a checkpoint in, a smaller one out."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from jx_neuron.cli import interrupts, options
from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError


def command(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write, new or empty.",
            show_default=False,
            callback=options.path,
        ),
    ],
    model: options.Model = None,
    demo: options.Demo = False,
    quant: options.QuantForm = "int8",
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", min=2, metavar="N", help="Inputs that share a scale of int4.", show_default="32"),
    ] = None,
    w8a8: Annotated[
        bool, typer.Option("--w8a8", help="Have vLLM and transformers round activations to 8 bits too.")
    ] = False,
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write a checkpoint in 8 or 4 bits, in the compressed-tensors format, also for Hugging Face transformers and vLLM.

    Only matrices are quantized. Embeddings and the head are not.

    jx-neuron quantize ./my-llama --quant int4 -o my-llama-int4

    jx-neuron quantize --demo -o smollm2-int8
    """
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm.quantizing import quantize
    from jx_neuron.util import durable

    if (model is None) != demo:
        raise InputError("name one model, or --demo")
    if group_size is not None and quant != "int4":
        raise InputError("--group-size goes with --quant int4; leave it out")
    interrupts.at_end.append(durable.abandon)
    written = quantize(model or demo_model(), output, quant, group_size, w8a8, revision)
    if as_json:
        counts = dict(quantized=written.quantized, kept=written.kept, bytes=written.nbytes)
        typer.echo(json.dumps(dict(directory=str(written.folder), quant=quant) | counts))
    else:
        print_message(
            f"{written.quantized} matrices in {quant} and {written.kept} tensors as they were, "
            f"{decimal(written.nbytes)}, in {written.folder}"
        )
