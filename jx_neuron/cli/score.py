"""jx-neuron score: how well a model predicts a text."""

import json
from typing import Annotated

import typer

from jx_neuron.cli import options
from jx_neuron.cli.prompts import read_text
from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] FILE",
            help="A checkpoint folder, .gguf file or hub id, and a text file in UTF-8, or - for standard "
            "input. With --demo, the file only.",
            show_default=False,
            autocompletion=options.models,
        ),
    ],
    demo: options.Demo = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=2, metavar="N", help="Score the first N tokens.", show_default="all"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens between the beginnings of windows, for a text longer than --n-positions.",
            show_default="half of --n-positions",
        ),
    ] = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    tp: options.Tp = 1,
    n_positions: options.NPositions = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the perplexity of a text, such as before and after quantization.

    jx-neuron score ./my-llama text.txt --quant int8

    jx-neuron score --demo text.txt --tokens 20000
    """
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    if len(arguments) != 2 - demo:
        raise InputError("name a model and one file of text, or with --demo the file alone")
    text = read_text(arguments[-1])
    model = NeuronAutoModelForCausalLM.from_pretrained(
        demo_model() if demo else options.model(arguments[0]),
        n_positions=n_positions,
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, output_all_logits=True),
        revision=revision,
        adapter=adapter,
    )
    ids = model.text_tokenizer(text)["input_ids"][:tokens]
    if len(ids) < 2:
        raise InputError(f"{arguments[-1]} has {len(ids)} tokens; a score takes 2 or more")
    (score,) = model.score([ids], stride=stride)
    if as_json:
        fields = dict(tokens=score.tokens, log_likelihood=score.log_likelihood, perplexity=score.perplexity)
        typer.echo(json.dumps(dict(amp=amp, quant=quant) | fields))
    else:
        print_message(f"perplexity {score.perplexity:.4f} over {score.tokens} tokens")
