"""The arguments and options that commands share, and their shell completions."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jx_neuron.cli import interrupts
from jx_neuron.cli.terminal import reserve_stdout, shortened
from jx_neuron.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from jx_neuron.config import KVCacheQuantizationConfig
    from jx_neuron.engine.options import SamplingParams

KV_FORMS = {"int8": "s8", "fp8": "f8e4m3fn"}
"""The names of --kv-quant, and the quant_dtype of each."""


def path(value: Any) -> Any:
    """Returns `value` where the system accepts it as a path, of a file that exists or not.

    Raises InputError for the home folder of an unknown user, OSError for a name that is too long or a folder without
    permission.
    """
    try:
        if value is not None:
            Path(value).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except RuntimeError:
        raise InputError(f"{shortened(str(value))}: there is no such user, and so no home folder") from None
    return value


def model(value: Any) -> Any:
    """Returns `value` where it can name a checkpoint: the `path` of a folder or a file, or a Hub id.

    Raises InputError for devices and pipes, and for an empty name.
    """
    where = Path(path(value) or "").expanduser()
    if value == "" or (where.exists() and not (where.is_dir() or where.is_file())):
        raise InputError(f"{value!r} is no model; name a checkpoint folder, .gguf file or hub id")
    if value == "demo" and not where.exists():
        raise InputError("there is no folder 'demo' here; for the demo model, type --demo without a name")
    return value


def models() -> list[str]:
    """The names of known checkpoints."""
    from jx_neuron.models.known import KNOWN

    return list(KNOWN)


def kv_cache(name: str | None) -> "KVCacheQuantizationConfig | None":
    """How --kv-quant has keys and values stored. Raises InputError for a form that does not exist."""
    from jx_neuron.config import KVCacheQuantizationConfig

    if name is None:
        return None
    if name not in KV_FORMS:
        raise InputError(f"--kv-quant {name} does not exist; it may be {' or '.join(KV_FORMS)}")
    return KVCacheQuantizationConfig(KV_FORMS[name])


def _amps() -> list[str]:
    from jx_neuron.config import AMP

    return list(AMP)


def _quants() -> list[str]:
    return ["int8", "int4", "fp8"]


def neuron_config(quant: str | None, kv_quant: str | None = None, **options: Any) -> Any:
    """The NeuronConfig of --quant and --kv-quant. Raises a JxNeuronError for a form that does not exist."""
    from jx_neuron.config import NeuronConfig, QuantizationConfig

    weights = None if quant is None else QuantizationConfig.named(quant)
    return NeuronConfig(quant=weights, kv_cache_quant=kv_cache(kv_quant), **options)


def drafter(draft: str | None, target: Any) -> Any:
    """What --draft names for the model `target`: "ngram", an EAGLE-3 head, or a model made as it is, with weights as
    they are stored. Raises a JxNeuronError that names --draft for a checkpoint that is not there."""
    from jx_neuron.llm import NeuronAutoModelForCausalLM, eagle

    if draft in (None, "ngram"):
        return draft
    try:
        is_head = eagle.is_head(model(draft))
    except CheckpointError as error:
        raise CheckpointError(f"--draft {draft} is neither ngram nor a model that can be read: {error}") from error
    if is_head:
        return target.drafter(model(draft))
    settings = target.settings
    return NeuronAutoModelForCausalLM.from_pretrained(
        model(draft),
        batch_size=list(settings.batch_sizes),
        n_positions=settings.buckets.capacity,
        amp=settings.amp,
        tp_degree=settings.tp_degree,
    )


def adapters(pairs: list[str] | None) -> dict[str, str]:
    """The adapters of --adapters, by name. Raises InputError for what is no NAME=DIR, and for a name twice."""
    named = dict[str, str]()
    for pair in pairs or ():
        name, _, folder = pair.partition("=")
        if not name or not folder or name in named:
            raise InputError(f"--adapters {pair} is not legal; it takes NAME=DIR, each with a name of its own")
        named[name] = path(folder)
    return named


def join(hosts: str | None, rank: int | None, tp: int) -> None:
    """Joins the processes of --hosts, where it is given."""
    from jx_neuron import distributed
    from jx_neuron.nn.sharding import request_devices

    if hosts is None:
        if rank is not None:
            raise InputError("--host-rank goes with --hosts")
        return
    reserve_stdout()  # Gloo prints
    group = distributed.join(hosts, rank)
    interrupts.at_end.append(group.close)
    if not group.is_leader:  # launchers and terminals signal all processes, and the leader drains first
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: group.stop())
    request_devices(-(-tp // group.hosts.count))


def sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: list[str] | None = None,
) -> "SamplingParams":
    """The likeliest token each time, unless --temperature, --top-k or --top-p is given."""
    from jx_neuron.engine.options import SamplingParams

    greedy = temperature is None and top_k is None and top_p is None
    how = dict(top_p=top_p, temperature=temperature, seed=seed, stop=stop or None)
    return SamplingParams(max_tokens, top_k=1 if greedy else top_k, **how)  # type: ignore[arg-type]


def _targets() -> list[str]:
    from jx_neuron.lowering.verify.rules import TARGETS

    return list(TARGETS)


def instances() -> list[str]:
    """The instance types of plans."""
    from jx_neuron.planning import INSTANCES

    return [instance.name for instance in INSTANCES]


def groups() -> list[str]:
    """The instance types and UltraServers of fleets."""
    from jx_neuron.planning import ULTRASERVERS

    return [*instances(), *(group.name for group in ULTRASERVERS)]


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A checkpoint folder, .gguf file or hub id; none with --demo.",
        show_default=False,
        autocompletion=models,
        callback=model,
    ),
]
CHOICE, PROMPTS, MODEL = "How tokens are chosen", "Prompts", "Model"
"""Titles of groups of options."""
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "--temp", min=0, metavar="T", help="Sample at this temperature.", rich_help_panel=CHOICE
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, metavar="K", help="Sample from the K likeliest tokens; 0 for all.", rich_help_panel=CHOICE),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Sample from the likeliest tokens that sum to P.", rich_help_panel=CHOICE),
]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Make sampling repeatable.", rich_help_panel=CHOICE)]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="End an answer before this text; more than once for several.",
        show_default=False,
        rich_help_panel=CHOICE,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="A prompt; more than once for several.",
        show_default=False,
        rich_help_panel=PROMPTS,
    ),
]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="Take a file's whole text for a prompt; - is standard input. More than once for several.",
        show_default=False,
        rich_help_panel=PROMPTS,
    ),
]
System = Annotated[
    str,
    typer.Option("--system", metavar="TEXT", help="The system message.", show_default=False, rich_help_panel=PROMPTS),
]
Amp = Annotated[
    str,
    typer.Option(
        "--dtype",
        "--amp",
        metavar="DTYPE",
        help="Dtype of weights and cache: f32, f16 or bf16.",
        autocompletion=_amps,
        rich_help_panel=MODEL,
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Store weights in int8, int4 or fp8 (docs/quantization.md).",
        rich_help_panel=MODEL,
        show_default=False,
        autocompletion=_quants,
    ),
]
QuantForm = Annotated[
    str,
    typer.Option("--quant", metavar="FORM", help="int8, int4 or fp8 (docs/quantization.md).", autocompletion=_quants),
]
KvQuant = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Store keys and values in int8 or fp8.",
        show_default="as --dtype",
        rich_help_panel=MODEL,
        autocompletion=lambda: list(KV_FORMS),
    ),
]
Tp = Annotated[int, typer.Option(min=1, metavar="N", help="Tensor-parallel degree.", rich_help_panel=MODEL)]
Hosts = Annotated[
    str | None,
    typer.Option(
        metavar="HOST,HOST|auto",
        help="Share the model among processes, the first of which serves; auto asks torchrun, Slurm or "
        "LeaderWorkerSet (docs/several-hosts.md).",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
HostRank = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Which of --hosts this is.",
        show_default="the one with an address of here",
        rich_help_panel=MODEL,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at once.", rich_help_panel=MODEL)]
NPositions = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Longest prompt and answer together.",
        show_default="2048, or what it was trained on",
        rich_help_panel=MODEL,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="inf2, trn1, trn1n, trn2 or trn3.",
        show_default="NEURON_CC_FLAGS', or this machine's, or trn1",
        autocompletion=_targets,
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL)
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="ngram|MODEL",
        help="Guess tokens ahead, by prompt lookup, a smaller model or an EAGLE-3 head; the tokens stay the same "
        "(docs/speculation.md).",
        show_default=False,
        autocompletion=lambda: ["ngram", *models()],
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Merge a LoRA adapter, a folder of PEFT or a hub id.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Demo = Annotated[
    bool, typer.Option("--demo", help="Use SmolLM2-135M-Instruct, fetched once (93 MB).", rich_help_panel=MODEL)
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="A LoRA adapter side by side with others, a folder of PEFT or a hub id; more than once for several "
        "(docs/adapters.md).",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
