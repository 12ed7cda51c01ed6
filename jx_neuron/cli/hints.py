"""Hints of what to type: names that other programs have for commands and options, and misspelt ones."""

import difflib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIKE = 0.7  # difflib ratio from which a name is suggested for a misspelt one

COMMANDS: Mapping[str, str] = {
    "benchmark": "bench",
    "complete": "sample",
    "estimate": "plan",
    "eval": "score",
    "export": "compile",
    "generate": "sample",
    "infer": "sample",
    "list": "models",
    "ls": "models",
    "perplexity": "score",
    "server": "serve",
    "show": "info",
    "start": "serve",
    "validate": "check",
}
"""Commands of ollama, vLLM, mlx-lm and transformers, and ours."""

OPTIONS: Mapping[str, str] = {
    "--adapter-path": "--adapter",
    "--amp": "--dtype",
    "--bits": "--quant",
    "--ctx-size": "--n-positions",
    "--draft-model": "--draft",
    "--input-file": "--file",
    "--kv-cache-dtype": "--kv-quant",
    "--lora": "--adapter",
    "--lora-modules": "--adapter",
    "--max-context-len": "--n-positions",
    "--max-new-tokens": "--max-tokens",
    "--max-model-len": "--n-positions",
    "--max-num-seqs": "--batch-size",
    "--max-seq-len": "--n-positions",
    "--n-predict": "--max-tokens",
    "--num-ctx": "--n-positions",
    "--num-predict": "--max-tokens",
    "--output-dir": "--output",
    "--precision": "--dtype",
    "--prompt-file": "--file",
    "--quantization": "--quant",
    "--reverse-prompt": "--stop",
    "--speculative-config": "--draft",
    "--speculative-model": "--draft",
    "--system-prompt": "--system",
    "--temp": "--temperature",
    "--tensor-parallel-size": "--tp",
    "--torch-dtype": "--dtype",
    "--tp-degree": "--tp",
    "--tp-size": "--tp",
}
"""Options of vLLM, ollama, llama.cpp, mlx-lm and transformers, and ours."""

DOWNLOAD = "A model is downloaded when it is first used; hf download does only that"
FINE_TUNE = "Fine-tuning is in Python: examples/fine_tune.py, and docs/fine-tuning.md"
NO_COMMAND: Mapping[str, str] = {
    "convert": "A checkpoint needs no conversion; for 8 or 4 bits, type: jx-neuron quantize",
    **dict.fromkeys(("download", "pull"), DOWNLOAD),
    **dict.fromkeys(("fine-tune", "finetune", "lora", "train"), FINE_TUNE),
}
"""Commands of other programs that ours lacks, and what to do."""

INSTEAD: Mapping[str, str] = {
    "--device": "JAX_PLATFORMS chooses devices, such as JAX_PLATFORMS=cpu",
    "--do-sample": "--temperature, --top-k or --top-p makes it sample",
    "--gpu-memory-utilization": "--batch-size and --n-positions decide how much memory it takes; leave it out",
    "--max-length": "--max-tokens counts the tokens of the answer alone",
    "-m": "Name the model right after the command, without -m",
    "--model": "Name the model right after the command, without --model",
    "--stream": "Text is always printed as it is made; leave it out",
    "--trust-remote-code": "No code of a checkpoint is run; leave it out",
}
REQUESTS = {"--max-tokens": "max_tokens", "--system": "a system message", "--prompt": "a message"} | {
    f"--{name}": name for name in ("temperature", "top-p", "top-k", "seed", "stop")
}


def spellings(command: Any) -> dict[str, str]:
    """Every long spelling of a command's options, and the one that its help shows."""
    long = [[name for name in parameter.opts if name.startswith("--")] for parameter in command.params]
    return {name: names[0] for names in long for name in names} | {"--help": "--help"}


def for_option(command: Any, group: Any, typed: str) -> str:
    """A hint for an option that `command` lacks, as a sentence; empty if no option is similar."""
    known, name = spellings(command), typed.replace("_", "-")
    ours = known.get(name) or known.get(OPTIONS.get(name, ""))
    names = [ours] if ours else list(dict.fromkeys(known[near] for near in similar(name, list(known))))
    if names:
        return f"Did you mean {' or '.join(names)}?"
    if name in INSTEAD:
        return f"{INSTEAD[name]}."
    name = OPTIONS.get(name, name)
    if command.name == "serve" and name in REQUESTS:
        return f"It belongs in requests: {REQUESTS[name].replace('-', '_')} (docs/serving.md)."
    others = [other for other, its in getattr(group, "commands", {}).items() if name in spellings(its)]
    if command is group and others:
        return f"It comes after a command: jx-neuron {others[0]} {name}"
    return f"{name} goes with jx-neuron {' and '.join(others)}." if 0 < len(others) < 3 else ""


def for_command(typed: Sequence[str]) -> str:
    """A hint for a command that does not exist, as a sentence; empty if none is known.

    >>> for_command(["run", "./my-llama"])
    'Type: jx-neuron chat ./my-llama'
    >>> for_command(["./my-llama", "Hello there"])
    "It may be a model; the command comes first: jx-neuron sample ./my-llama 'Hello there'"
    """
    name, *rest = typed
    if name == "run":
        how = ["sample", "--chat"] if len(rest) > 1 else ["chat"]
        return "Type: " + shlex.join(["jx-neuron", *how, *rest])
    if name in NO_COMMAND:
        return f"{NO_COMMAND[name]}."
    if name in ("help", "version"):
        return f"Type: jx-neuron --{name}"
    if name in COMMANDS:
        return "Type: " + shlex.join(["jx-neuron", COMMANDS[name], *rest])
    if _is_like_a_model(name):
        return "It may be a model; the command comes first: " + shlex.join(["jx-neuron", "sample", *typed])
    return ""


def _is_like_a_model(name: str) -> bool:
    from jx_neuron.models.known import KNOWN

    return "/" in name or name.endswith(".gguf") or name in KNOWN or Path(name).exists()


def similar(typed: str, options: Sequence[str]) -> list[str]:
    """The options that begin with `typed`, then the ones with a similar spelling.

    >>> similar("--temp", ["--amp", "--help", "--temperature", "--tp"])
    ['--temperature']
    """
    begun = [option for option in options if option.startswith(typed)]
    names = [option.lstrip("-") for option in options if option not in begun]
    return begun + [f"--{name}" for name in difflib.get_close_matches(typed.lstrip("-"), names, cutoff=LIKE)]
