"""jx-neuron sample: prompts in, text out."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import typer

from jx_neuron.cli import options
from jx_neuron.cli.terminal import tell
from jx_neuron.errors import InputError


@dataclass
class Answer:
    """One prompt's answer, as --json prints it; times are seconds."""

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
            "standard input is one. With --demo, prompts alone.",
            show_default=False,
            autocompletion=options.models,
        ),
    ] = None,
    demo: options.Demo = False,
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

    Greedy unless --temperature, --top-k or --top-p is given. Text goes to standard output as it is made, timings to
    standard error.

        jx-neuron sample --demo "The capital of France is"

        jx-neuron sample ./my-llama --chat --temperature 0.7 "Why is the sky blue?"
    """
    from jx_neuron.demo import demo_model
    from jx_neuron.modeling import NeuronAutoModelForCausalLM

    given = list(arguments or [])
    if not demo and not given:
        raise InputError("no model: name a checkpoint folder, .gguf file or hub id, or use --demo")
    path = demo_model() if demo else given.pop(0)
    model = NeuronAutoModelForCausalLM.from_pretrained(
        path, batch_size=batch_size, n_positions=n_positions, tp_degree=tp, amp=amp, revision=revision
    )
    texts = given or _standard_input()
    encoded = [_encode(model.tokenizer, text, chat) for text in texts]
    longest = max(map(len, encoded)) + max_new_tokens
    if longest > model.buckets.capacity:
        raise InputError(
            f"a prompt of {longest - max_new_tokens} tokens and --max-new-tokens {max_new_tokens} make {longest}, "
            f"beyond the {model.buckets.capacity} positions; shorten either, or raise --n-positions"
        )
    greedy = temperature is None and top_k is None and top_p is None
    how = dict(top_k=1 if greedy else top_k, top_p=top_p, temperature=temperature, seed=seed)
    model.to_neuron()
    answers: list[Answer] = []
    for first in range(0, len(texts), model.batch_size):
        batch = slice(first, first + model.batch_size)
        for answer in _answer(
            model, texts[batch], encoded[batch], max_new_tokens, how, live=not as_json, echo=not chat
        ):
            if as_json:
                typer.echo(json.dumps(asdict(answer), ensure_ascii=False))
            answers.append(answer)
    if not as_json:
        _report(answers)


def _standard_input() -> list[str]:
    if sys.stdin.isatty():
        tell("Type prompts, one a line; end with Ctrl-D.", err=True)
    texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise InputError("no prompt: give one after MODEL, or one a line on standard input")
    return texts


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if chat:
        if not tokenizer.chat_template:
            raise InputError("this tokenizer has no chat template; leave --chat out")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    ids: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise InputError(f"the prompt {text!r} has no tokens; give it some text")
    return ids


def _answer(
    model: Any,
    texts: Sequence[str],
    encoded: Sequence[list[int]],
    new: int,
    how: dict[str, Any],
    *,
    live: bool,
    echo: bool,
) -> Iterator[Answer]:
    answers = [Answer(text, prompt_tokens=len(ids)) for text, ids in zip(texts, encoded, strict=True)]
    width = max(map(len, encoded))
    ids_bt = np.array([[0] * (width - len(row)) + row for row in encoded])
    start_ids = [width - len(row) for row in encoded]
    write = live and len(texts) == 1
    if write and echo:
        typer.echo(texts[0], nl=False)
    ended_b, first, last = np.zeros(len(encoded), bool), None, 0.0
    for step in model.stream(ids_bt, width + new, start_ids, **how):
        first, last = step.seconds if first is None else first, step.seconds
        rows = zip(answers, step.tokens.tolist(), step.text, step.finish_reasons, ended_b, strict=True)
        for answer, token, text, reason, over in rows:
            if not over:
                answer.tokens.append(token)
                answer.text += text
                answer.finish_reason = reason or "length"
                if write:
                    typer.echo(text, nl=False)
        ended_b = step.ended
    if write:
        typer.echo()
    for answer in answers:
        answer.time_to_first_token = first or 0.0
        further = len(answer.tokens) - 1
        answer.tokens_per_second = further / (last - answer.time_to_first_token) if further else None
        if live and not write:
            typer.echo((answer.prompt if echo else "") + answer.text + "\n")
        yield answer


def _report(answers: Sequence[Answer]) -> None:
    rates = [a.tokens_per_second for a in answers if a.tokens_per_second]
    made = sum(len(a.tokens) for a in answers)
    rate = f", {np.mean(rates):.1f} tokens/s a prompt" if rates else ""
    first = np.mean([a.time_to_first_token for a in answers])
    tell(f"{made} tokens{rate}, first token after {first:.2f} s", err=True)
