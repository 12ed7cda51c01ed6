"""The options of neuronx-cc, and the flags that follow from them and from the user's environment."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from jx_neuron.errors import CompilerError
from jx_neuron.lowering.verify.rules import target_of

FLAGS_VARIABLE = "NEURON_CC_FLAGS"
LNC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
DUMP_VARIABLE = "NEURONX_DUMP_TO"

_ALIASES = {"-O": "--optlevel", "-lnc": "--logical-nc-config", "--lnc": "--logical-nc-config"}
_TAKING_A_VALUE = {
    "--framework",
    "--target",
    "--model-type",
    "--auto-cast",
    "--auto-cast-type",
    "--native-int64",
    "--implicit-integer-downcast",
    "--distribution-strategy",
    "--logical-nc-config",
    "--optlevel",
    "--logfile",
    "--output",
    "--verbose",
}
_RESERVED = {
    "--output": "every program has its own NEFF",
    "--logfile": f"every program has its own log, kept where {DUMP_VARIABLE} says",
}


@dataclass(frozen=True)
class CompilerOptions:
    """Options of neuronx-cc. None leaves an option to `NEURON_CC_FLAGS`, then to the default named here.

    Attributes:
      target: inf2, trn1 (default), trn1n, trn2 or trn3.
      model_type: generic, transformer (default) or unet-inference.
      auto_cast: none (default), matmult or all.
      auto_cast_type: bf16, fp16, tf32 or fp8_e4m3.
      optlevel: 1, 2 or 3.
      logical_nc_config: physical cores that make a logical one, 1 or 2; trn2 and trn3 only. Default
        `NEURON_LOGICAL_NC_CONFIG`, which the runtime goes by.
      compilation_worker_count: programs compiled at a time. Default `NEURON_COMPILATION_WORKER_COUNT`, then a
        quarter of the machine's cores: the compiler has threads of its own and takes gigabytes of memory.
    """

    target: str | None = None
    model_type: str | None = None
    auto_cast: str | None = None
    auto_cast_type: str | None = None
    optlevel: int | None = None
    logical_nc_config: int | None = None
    compilation_worker_count: int | None = None

    def __post_init__(self) -> None:
        legal: dict[str, tuple[object, ...]] = {
            "model_type": ("generic", "transformer", "unet-inference"),
            "auto_cast": ("none", "matmult", "all"),
            "auto_cast_type": ("bf16", "fp16", "tf32", "fp8_e4m3"),
            "optlevel": (1, 2, 3),
            "logical_nc_config": (1, 2),
        }
        for name, values in legal.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise CompilerError(f"{name}={value!r} is none of {', '.join(map(str, values))}")
        if self.target is not None:
            target_of(self.target)
        if self.compilation_worker_count is not None and self.compilation_worker_count < 1:
            raise CompilerError(f"compilation_worker_count={self.compilation_worker_count}: at least 1 is needed")


def user_target() -> str | None:
    """The target that `NEURON_CC_FLAGS` names; None where it names none."""
    return _last_value(_user_flags(), "--target")


def target(options: CompilerOptions) -> str:
    """The instance family to compile for."""
    requested = user_target()
    if options.target and requested and options.target != requested:
        raise CompilerError(
            f"{FLAGS_VARIABLE} asks for --target={requested}, but the programs are for {options.target}. "
            f"Drop the flag, or ask for target {requested} in both"
        )
    return options.target or requested or "trn1"


def flags(options: CompilerOptions) -> list[str]:
    """The flags of a compilation, in one spelling (`--name=value`).

    The defaults of flags that the user has not set come first, then the user's from `NEURON_CC_FLAGS`. neuronx-cc
    takes the last of each.

    Raises CompilerError for flags that contradict the target, and for those in `_RESERVED`.
    """
    user_flags = _user_flags()
    for name, reason in _RESERVED.items():
        if any(flag.startswith(f"{name}=") for flag in user_flags):
            raise CompilerError(f"{FLAGS_VARIABLE} sets {name}, but {reason}. Drop the flag")
    defaults = {
        "--framework": "XLA",
        "--target": target(options),
        "--model-type": options.model_type or "transformer",
        "--auto-cast": options.auto_cast or "none",
        "--auto-cast-type": options.auto_cast_type,
        "--optlevel": options.optlevel,
        "--logical-nc-config": _logical_nc_config(options, _last_value(user_flags, "--logical-nc-config")),
    }
    return [
        f"{name}={value}" for name, value in defaults.items() if value is not None and not _last_value(user_flags, name)
    ] + user_flags


def key_flags(flags: Sequence[str]) -> list[str]:
    """The flags that can change a NEFF, which are part of its key in the cache."""
    return [flag for flag in flags if not flag.startswith("--verbose=")]


def _user_flags() -> list[str]:
    text = os.environ.get(FLAGS_VARIABLE, "")
    try:
        tokens = iter(shlex.split(text))
    except ValueError as error:
        raise CompilerError(f"{FLAGS_VARIABLE}={text} is no command line: {error}") from error
    flags = []
    for token in tokens:
        name, equals, value = token.partition("=")
        if re.fullmatch(r"-O\d", token):
            name, equals, value = "-O", "=", token[2:]
        name = _ALIASES.get(name, name)
        if name not in _TAKING_A_VALUE:
            flags.append(token)
            continue
        if not equals and (value := next(tokens, "")) == "":
            raise CompilerError(f"{FLAGS_VARIABLE}={text}: {token} is given without a value")
        flags.append(f"{name}={value}")
    return flags


def _last_value(flags: Sequence[str], name: str) -> str | None:
    return next((flag.partition("=")[2] for flag in reversed(flags) if flag.startswith(f"{name}=")), None)


def _logical_nc_config(options: CompilerOptions, user_value: str | None) -> str | None:
    """The value on which `options`, the user's flag and the runtime's variable agree; None where the target has no
    choice."""
    settings = {
        "logical_nc_config": None if options.logical_nc_config is None else str(options.logical_nc_config),
        f"--logical-nc-config in {FLAGS_VARIABLE}": user_value,
    }
    family = target_of(target(options))
    choices = [str(choice) for choice in family.lnc_choices]
    if len(choices) > 1:
        settings[LNC_VARIABLE] = os.environ.get(LNC_VARIABLE)
    values = {source: value for source, value in settings.items() if value}
    for source, value in values.items():
        if value not in choices:
            raise CompilerError(
                f"{source} is {value}, but a logical core of {family.name} is made of {' or '.join(choices)} "
                "(NCC_EARG001). Drop the setting"
            )
    if len(set(values.values())) > 1:
        summary = ", ".join(f"{source} is {value}" for source, value in values.items())
        raise CompilerError(f"the sizes of a logical core do not agree: {summary}. Set them alike")
    return next(iter(values.values()), None) if len(choices) > 1 else None
