"""jx-neuron sample: prompts in, text out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import typer

from jx_neuron.cli import options
from jx_neuron.cli.prompts import Prompt, from_ids, from_text, lines, texts_of, typed
from jx_neuron.cli.terminal import print_message
from jx_neuron.errors import InputError, JxNeuronError

NEW_TOKENS = 128  # as jx_neuron.generate has


@dataclass
class Answer:
    """One answer to a prompt, as --json prints it; times are seconds. Without a tokenizer, `text` is empty; without
    --draft, `drafted` and `accepted` are null, and without --adapters `adapter` is."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
    time_to_first_token: float = 0.0
    tokens_per_second: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    adapter: str | None = None


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]...",
            help="A checkpoint folder, .gguf file or hub id, then prompts. Without prompts, each line of "
            "standard input is a prompt. With --demo, prompts only.",
            show_default=False,
            autocompletion=options.models,
        ),
    ] = None,
    prompt: options.Prompts = None,
    file: options.Files = None,
    demo: options.Demo = False,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IDS",
            help="A prompt as token ids, such as 1,2,3; more than once for several. A model without a tokenizer "
            "answers in ids.",
            show_default=False,
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Apply the tokenizer's chat template to each prompt.", rich_help_panel=options.PROMPTS
        ),
    ] = False,
    system: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="The system message of each prompt; implies --chat.",
            show_default=False,
            rich_help_panel=options.PROMPTS,
        ),
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--max-new-tokens",
            min=1,
            metavar="N",
            help="Longest answer, in tokens.",
            show_default=f"{NEW_TOKENS}, or as many as there is room",
            rich_help_panel=options.CHOICE,
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    amp: options.Amp = "f32",
    quant: options.Quant = None,
    kv_quant: options.KvQuant = None,
    tp: options.Tp = 1,
    batch_size: options.BatchSize = 1,
    n_positions: options.NPositions = None,
    draft: options.Draft = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    adapters: options.Adapters = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each prompt, one per line.")] = False,
) -> None:
    """Answer prompts with a model.

    Decoding is greedy unless --temperature, --top-k or --top-p is given ("Defaults" in docs/getting-started.md). Text
    goes to standard output while it is generated, timings to standard error. With --adapters, each adapter answers each
    prompt.

        jx-neuron sample --demo "The capital of France is"

        jx-neuron sample ./my-llama --chat --temperature 0.7 -p "Why is the sky blue?" --max-tokens 64
    """
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    words = list(arguments or [])
    if not demo and not words:
        raise InputError("no model: name a checkpoint folder, .gguf file or hub id, or use --demo")
    if (chat or system) and ids:
        raise InputError("--chat takes text; leave it out with --ids, or give the prompt as text")
    name = None if demo else options.model(words.pop(0))
    texts = words + texts_of(prompt, file)
    chat = chat or bool(system)
    model = NeuronAutoModelForCausalLM.from_pretrained(
        demo_model() if name is None else name,
        batch_size=batch_size,
        n_positions=n_positions,
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, kv_quant),
        revision=revision,
        adapter=adapter,
        adapters=options.adapters(adapters),
    )
    names = model.settings.adapters.names if model.settings.adapters else [None]
    drafter = options.drafter(draft, model)
    sampling = options.sampling(max_new_tokens, temperature, top_k, top_p, seed, stop)

    def answered(prompts: Sequence[Prompt]) -> list[Answer]:
        longest = [_longest(each, max_new_tokens, model.buckets.capacity) for each in prompts]
        samplings = [replace(sampling, max_tokens=tokens) for tokens in longest]
        return _answers(model, prompts, samplings, as_json, drafter, names)

    if texts or ids or not typed():
        prompts = [from_ids(model, row) for row in ids or []]
        prompts += [from_text(model, text, chat, system) for text in texts or ([] if ids else lines())]
        if not prompts:
            raise InputError("no prompt: give one after MODEL, or one a line on standard input")
        answers = answered(prompts)
    else:
        model.to_neuron()
        print_message("Type a prompt a line; end with Ctrl-D.", err=True)
        answers = []
        for line in lines():
            try:
                answers += answered([from_text(model, line, chat, system)])
            except JxNeuronError as error:
                print_message(f"jx-neuron: {error}", err=True)
    if answers and not as_json:
        _report(answers)


def _longest(prompt: Prompt, asked: int | None, capacity: int) -> int:
    """Most tokens of the answer. Raises InputError where the positions have no room for them."""
    new = min(NEW_TOKENS, max(1, capacity - len(prompt.ids))) if asked is None else asked
    if (length := len(prompt.ids) + new) > capacity:
        raise InputError(
            f"a prompt of {len(prompt.ids)} tokens and an answer of {new} (--max-tokens) make {length}, "
            f"beyond the {capacity} positions; shorten either, or raise --n-positions"
        )
    return new


def _answers(
    model: Any,
    several: Sequence[Prompt],
    samplings: Sequence[Any],
    as_json: bool,
    drafter: Any,
    adapters: Sequence[str | None],
) -> list[Answer]:
    """The answers by each adapter, printed in the order of their prompts; a single one is printed token by token."""
    from jx_neuron.engine.stopping import StopFilter

    by = [(prompt, sampling, name) for prompt, sampling in zip(several, samplings, strict=True) for name in adapters]
    prompts, samplings, names = map(list, zip(*by, strict=True))
    answers = [Answer(prompt.text, prompt_tokens=len(prompt.ids), adapter=name) for prompt, _, name in by]
    printed = [f"{name}: {prompt.printed}" if adapters[1:] else prompt.printed for prompt, _, name in by]
    live = len(prompts) == 1 and not as_json
    ids = [prompt.ids for prompt in prompts]
    events = model.generate(ids, samplings, stream=True, draft=drafter, adapter=names)
    if live:
        typer.echo(printed[0], nl=False)
    filters = [StopFilter(sampling.stop or (), include=False) for sampling in samplings]
    ended, shown = [False] * len(prompts), 0
    for event in events:
        answer, text = answers[event.prompt], f",{event.token}"
        if event.text is not None:
            text, _ = filters[event.prompt].add(event.text, last=event.finish_reason is not None)
            answer.text += text
        answer.time_to_first_token = answer.time_to_first_token or event.seconds
        answer.tokens.append(event.token)
        printed[event.prompt] += text
        if live:
            typer.echo(text, nl=False)
        if event.finish_reason is None:
            continue
        answer.finish_reason, ended[event.prompt] = event.finish_reason, True
        if event.drafts is not None:
            answer.drafted, answer.accepted = event.drafts.proposed, event.drafts.accepted
        if further := len(answer.tokens) - 1:
            answer.tokens_per_second = further / (event.seconds - answer.time_to_first_token)
        while shown < len(prompts) and ended[shown]:
            if as_json:
                typer.echo(json.dumps(asdict(answers[shown]), ensure_ascii=False))
            else:
                typer.echo("" if live else printed[shown] + "\n")
            shown += 1
    return answers


def _report(answers: Sequence[Answer]) -> None:
    rates = [a.tokens_per_second for a in answers if a.tokens_per_second]
    token_count = sum(len(a.tokens) for a in answers)
    rate = f", {np.mean(rates):.1f} tokens/s a prompt" if rates else ""
    first = np.mean([a.time_to_first_token for a in answers])
    drafted = sum(a.drafted or 0 for a in answers)
    drafts = f", {sum(a.accepted or 0 for a in answers)} of {drafted} drafted tokens accepted" if drafted else ""
    print_message(f"{token_count} tokens{rate}, first token after {first:.2f} s{drafts}", err=True)
