"""jx-neuron sample: prompts in, text out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import typer

from jx_neuron.cli import options
from jx_neuron.cli.prompts import Prompt, from_ids, from_text, lines, typed
from jx_neuron.cli.terminal import tell
from jx_neuron.errors import InputError, JxNeuronError


@dataclass
class Answer:
    """One prompt's answer, as --json prints it; times are seconds. Without a tokenizer, `text` is empty."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
    time_to_first_token: float = 0.0
    tokens_per_second: float | None = None


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]...",
            help="A checkpoint folder, .gguf file or hub id, then prompts. Without prompts, each line of "
            "standard input is one, answered as it is typed in a terminal. With --demo, prompts alone.",
            show_default=False,
            autocompletion=options.models,
        ),
    ] = None,
    demo: options.Demo = False,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IDS",
            help="A prompt as token ids, such as 1,2,3; more than once for several. A model without a tokenizer "
            "answers in ids.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt through the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(min=0, metavar="T", help="Sample at this temperature.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Sample from the K likeliest tokens; 0 for all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample from the likeliest tokens that sum to P.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Make sampling repeatable.")] = None,
    amp: options.Amp = "f32",
    tp: options.Tp = 1,
    batch_size: options.BatchSize = 1,
    n_positions: options.NPositions = None,
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt, one a line.")] = False,
) -> None:
    """Answer prompts with a model.

    The likeliest token is taken each time unless --temperature, --top-k or --top-p is given ("Defaults" in
    docs/getting-started.md). Text goes to standard output as it is made, timings to standard error.

        jx-neuron sample --demo "The capital of France is"

        jx-neuron sample ./my-llama --chat --temperature 0.7 "Why is the sky blue?"
    """
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    texts = list(arguments or [])
    if not demo and not texts:
        raise InputError("no model: name a checkpoint folder, .gguf file or hub id, or use --demo")
    if chat and ids:
        raise InputError("--chat takes text; leave it out with --ids, or give the prompt as text")
    model = NeuronAutoModelForCausalLM.from_pretrained(
        demo_model() if demo else options.model(texts.pop(0)),
        batch_size=batch_size,
        n_positions=n_positions,
        tp_degree=tp,
        amp=amp,
        revision=revision,
    )
    greedy = temperature is None and top_k is None and top_p is None
    how = dict(top_k=1 if greedy else top_k, top_p=top_p, temperature=temperature, seed=seed)

    def answered(prompts: Sequence[Prompt]) -> list[Answer]:
        for prompt in prompts:
            _check_length(prompt, max_new_tokens, model.buckets.capacity)
        batches = [prompts[first : first + model.batch_size] for first in range(0, len(prompts), model.batch_size)]
        return [answer for batch in batches for answer in _answer(model, batch, max_new_tokens, how, as_json)]

    if texts or ids or not typed():
        prompts = [from_ids(model, row) for row in ids or []]
        prompts += [from_text(model, text, chat) for text in texts or ([] if ids else lines())]
        if not prompts:
            raise InputError("no prompt: give one after MODEL, or one a line on standard input")
        answers = answered(prompts)
    else:
        model.to_neuron()
        tell("Type a prompt a line; end with Ctrl-D.", err=True)
        answers = []
        for line in lines():
            try:
                answers += answered([from_text(model, line, chat)])
            except JxNeuronError as error:
                tell(f"jx-neuron: {error}", err=True)
    if answers and not as_json:
        _report(answers)


def _check_length(prompt: Prompt, new: int, capacity: int) -> None:
    if (length := len(prompt.ids) + new) > capacity:
        raise InputError(
            f"a prompt of {len(prompt.ids)} tokens and --max-new-tokens {new} make {length}, "
            f"beyond the {capacity} positions; shorten either, or raise --n-positions"
        )


def _answer(model: Any, prompts: Sequence[Prompt], new: int, how: dict[str, Any], as_json: bool) -> list[Answer]:
    """The answers to a batch, printed: one by itself as it is made."""
    answers = [Answer(prompt.given, prompt_tokens=len(prompt.ids)) for prompt in prompts]
    printed = [prompt.printed for prompt in prompts]
    width = max(len(prompt.ids) for prompt in prompts)
    ids_bt = np.array([[0] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts])
    steps = model.stream(ids_bt, width + new, [width - len(prompt.ids) for prompt in prompts], **how)
    live = len(prompts) == 1 and not as_json
    if live:
        typer.echo(printed[0], nl=False)
    ended_b, first, last = np.zeros(len(prompts), bool), None, 0.0
    for step in steps:
        first, last = step.seconds if first is None else first, step.seconds
        for row in np.flatnonzero(~ended_b):
            answer, token = answers[row], int(step.tokens[row])
            answer.tokens.append(token)
            answer.text += step.text[row] if step.text else ""
            answer.finish_reason = step.finish_reasons[row] or "length"
            shown = step.text[row] if step.text else f",{token}"
            printed[row] += shown
            if live:
                typer.echo(shown, nl=False)
        ended_b = step.ended
    if live:
        typer.echo()
    for answer, text in zip(answers, printed, strict=True):
        answer.time_to_first_token = first or 0.0
        further = len(answer.tokens) - 1
        answer.tokens_per_second = further / (last - answer.time_to_first_token) if further else None
        if as_json:
            typer.echo(json.dumps(asdict(answer), ensure_ascii=False))
        elif not live:
            typer.echo(text + "\n")
    return answers


def _report(answers: Sequence[Answer]) -> None:
    rates = [a.tokens_per_second for a in answers if a.tokens_per_second]
    made = sum(len(a.tokens) for a in answers)
    rate = f", {np.mean(rates):.1f} tokens/s a prompt" if rates else ""
    first = np.mean([a.time_to_first_token for a in answers])
    tell(f"{made} tokens{rate}, first token after {first:.2f} s", err=True)
