"""jx-neuron chat: a conversation in a terminal."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from jx_neuron.cli import interrupts, options
from jx_neuron.cli.prompts import SIGN, every_line, texts_of, typed
from jx_neuron.cli.terminal import print_message
from jx_neuron.engine.messages import rendered_by_template
from jx_neuron.errors import InputError, JxNeuronError
from jx_neuron.util.durable import write_file

HELP = """/reset         begin a new conversation
/system TEXT   begin one with this system message; without TEXT, with none
/save FILE     write the conversation to a file, as JSON
/help          show this
/exit          leave, as Ctrl-D does
A line that ends in \\ goes on in the next; \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer, or discards what is typed; twice where nothing is typed, it leaves."""


@dataclass
class _Interrupt:
    """The effect of Ctrl-C: it stops an answer, or ends the typing of a message.

    idle: how often in a row it came where nothing was typed.
    """

    typing: bool = False
    stopped: bool = False
    idle: int = 0

    def __call__(self) -> None:
        if not self.typing:
            self.stopped = True
            return
        readline = sys.modules.get("readline")
        self.idle = 0 if readline is not None and readline.get_line_buffer() else self.idle + 1
        raise KeyboardInterrupt


@dataclass
class _Chat:
    model: Any
    sampling: Any
    conversation: Any
    interrupt: _Interrupt
    messages: list[dict[str, str]] = field(default_factory=list)

    def begin(self, system: str = "") -> None:
        """A new conversation, with a system message or none."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> None:
        """Prints the answer to a message, and remembers both. Raises InputError where no position is left."""
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = rendered_by_template(self.model.tokenizer, messages, "use jx-neuron sample")
        ids = self.model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        capacity = self.model.buckets.capacity
        if len(ids) >= capacity:
            raise InputError(
                f"the conversation would have {len(ids)} tokens, and n_positions={capacity} leaves no room for an "
                "answer: say less, /reset, or start with a larger --n-positions"
            )
        from jx_neuron.engine.stopping import StopFilter

        stop = StopFilter(self.sampling.stop or (), include=False)
        self.interrupt.stopped, answer, reason = False, "", None
        with closing(self.conversation.answer(self.model.request(ids, self.sampling))) as events:
            for event in events:
                reason = event.finish_reason
                text, _ = stop.add(event.text, last=reason is not None)
                typer.echo(text, nl=False)
                sys.stdout.flush()
                answer += text
                if self.interrupt.stopped:
                    break
        typer.echo()
        if self.interrupt.stopped and reason is None:
            print_message("(stopped)", err=True)
        elif reason == "length":
            print_message("(cut short by --max-tokens, or by n_positions)", err=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def save(self, name: str) -> None:
        """Writes the messages to a file. Raises InputError without a name, OSError where it cannot be written."""
        if not name:
            raise InputError("/save takes the name of a file")
        path = Path(options.path(name)).expanduser()
        write_file(path, json.dumps(self.messages, ensure_ascii=False, indent=1).encode() + b"\n")
        print_message(f"{len(self.messages)} messages in {path}", err=True)

    def obey(self, line: str) -> bool:
        """Does what a line says, a command or a message. Returns whether to go on."""
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], object]] = {
            "/reset": lambda _: self.begin(),
            "/system": self.begin,
            "/save": self.save,
            "/help": lambda _: print_message(HELP, err=True),
        }
        if name == "/exit":
            return False
        if name in commands:
            commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            raise InputError(f"there is no {name}; /help lists what there is")
        else:
            self.say(line)
        return True


def command(
    argument: options.Model = None,
    demo: options.Demo = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Say this, and leave after the answer; more than once for several turns.",
            show_default=False,
            rich_help_panel=options.PROMPTS,
        ),
    ] = None,
    file: options.Files = None,
    system: options.System = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--max-new-tokens",
            min=1,
            metavar="N",
            help="Longest answer, in tokens.",
            show_default="as many as there is room",
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
    n_positions: options.NPositions = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
) -> None:
    """Talk with a model in the terminal.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. If standard input is not a terminal, each line is a
    message. Only the new tokens of each message are computed.

        jx-neuron chat --demo

        jx-neuron chat ./my-llama --temperature 0.7 --system "Answer in one sentence."
    """
    from jx_neuron.checkpoint.demo import demo_model
    from jx_neuron.engine.conversation import Conversation
    from jx_neuron.llm import NeuronAutoModelForCausalLM

    if demo == (argument is not None):
        raise InputError("name a checkpoint folder, .gguf file or hub id, or use --demo alone")
    messages = texts_of(prompt, file)
    model = NeuronAutoModelForCausalLM.from_pretrained(
        argument or demo_model(),
        n_positions=n_positions,
        tp_degree=tp,
        amp=amp,
        neuron_config=options.neuron_config(quant, kv_quant),
        revision=revision,
        adapter=adapter,
    )
    rendered_by_template(model.tokenizer, [{"role": "user", "content": "a"}], "use jx-neuron sample")
    sampling = options.sampling(max_new_tokens, temperature, top_k, top_p, seed, stop)
    interrupt = _Interrupt()
    chat = _Chat(model.to_neuron(), sampling, Conversation(model.engine), interrupt)
    chat.begin(system)
    if messages:
        for message in messages:
            chat.say(message)
        return
    if not typed():
        for message in _messages(every_line()):
            if message.strip() and not chat.obey(message):
                break
        return
    print_message("/help lists what can be typed; Ctrl-D leaves.", err=True)
    with suppress(ImportError):
        import readline  # noqa: F401  input() takes lines by it
    interrupts.replace(interrupt)
    while _turn(chat):
        pass


def _turn(chat: _Chat) -> bool:
    """Obeys what is typed next. Returns whether to go on."""
    interrupt = chat.interrupt
    try:
        interrupt.typing = True
        try:
            message = next(_messages(_typed_lines()), None)
        finally:
            interrupt.typing = False
        interrupt.idle = 0
        return message is not None and (not message.strip() or chat.obey(message))
    except KeyboardInterrupt:
        typer.echo(err=True)
        if interrupt.idle == 1:
            print_message("Ctrl-C again, or Ctrl-D, leaves.", err=True)
        return interrupt.idle < 2
    except UnicodeDecodeError as error:
        print_message(f"jx-neuron: what was typed is not UTF-8 text: {error}", err=True)
    except (JxNeuronError, OSError) as error:
        print_message(f"jx-neuron: {error}", err=True)
    return True


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            line = input(SIGN)
        except (EOFError, OSError):  # Ctrl-D, or the terminal is gone
            break
        yield line
    with suppress(OSError):
        typer.echo(err=True)


def _messages(lines: Iterator[str]) -> Iterator[str]:
    r"""Joins lines that end in a backslash with the next, and those between triple quotes.

    >>> list(_messages(iter(["a\\", "b", '\"\"\"c', "", 'd\"\"\"'])))
    ['a\nb', 'c\n\nd']
    """
    for line in lines:
        text = line
        if text.startswith('"""'):
            text = text[3:]
            while not text.endswith('"""') and (further := next(lines, None)) is not None:
                text += "\n" + further
            yield text.removesuffix('"""').strip("\n")
            continue
        while text.endswith("\\") and (further := next(lines, None)) is not None:
            text = text[:-1] + "\n" + further
        yield text
