"""Deployment of a decoder: lowering, checking, compiling and saving its programs."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron import artifact
from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.folder import CONFIG
from jx_neuron.compiler import neuronx_cc
from jx_neuron.compiler.options import CompilerOptions, target, user_target
from jx_neuron.errors import ArtifactError, ConfigError, LoweringError
from jx_neuron.lowering.signature import ProgramSpec
from jx_neuron.lowering.verify.checking import Violation, verify
from jx_neuron.lowering.verify.rules import target_of
from jx_neuron.runtime import neuron
from jx_neuron.runtime.base import Runtime
from jx_neuron.runtime.bundle import Bundle
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.util.temporary import temporary_folder

BACKENDS = ("xla", "host", "neuron")


def choose_backend(requested: str | None) -> str:
    """`requested` or, where that is None, neuron if a NeuronCore and what runs NEFFs on it are present, else xla.

    Raises ConfigError for a backend that does not exist.
    """
    if requested is None:
        return "neuron" if neuron.available() else "xla"
    if requested not in BACKENDS:
        raise ConfigError(f"backend={requested!r} does not exist; it may be one of {', '.join(BACKENDS)}")
    return requested


def target_for(requested: str | None) -> str:
    """The instance family `requested`, or that of NEURON_CC_FLAGS, or this machine's, or trn1.

    Raises CompilerError where the first two differ, and LoweringError for an unknown family.
    """
    machine = None if user_target() else neuron.target()
    return target_of(target(CompilerOptions(target=requested or machine))).name


@dataclass
class Deployment:
    """The lowered programs of a model, by key, and the NEFFs of the compiled ones."""

    settings: Settings
    programs: Mapping[ProgramKey, ProgramSpec]
    hlo: Callable[[str], bytes]
    neffs: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def violations(self, target: str, lnc: int | None = None) -> Iterator[tuple[str, list[Violation]]]:
        """Yields (program name, violations) of what neuronx-cc is documented to refuse on a target."""
        for program in self.programs.values():
            sources = getattr(program, "sources", None)
            yield program.name, verify(self.hlo(program.name), target, lnc=lnc, sources=sources)

    def check(self, target: str) -> None:
        """Records the target. Raises LoweringError, which lists everything that neuronx-cc would refuse for it."""
        errors = [
            f"{name}: {v}" for name, violations in self.violations(target) for v in violations if v.severity == "error"
        ]
        if errors:
            raise LoweringError(f"neuronx-cc would refuse the model for {target}:\n" + "\n".join(errors))
        self.settings = dataclasses.replace(self.settings, target=target)

    def compile(self, target: str | None = None, jobs: int | None = None) -> None:
        """Checks all programs, then compiles those without a NEFF with neuronx-cc.

        target: an instance family, as for `target_for`.

        Raises LoweringError for programs that the target does not support, and CompilerError where the compiler is
        missing or fails.
        """
        missing = [p.name for p in self.programs.values() if p.name not in self.neffs]
        if not missing:
            return
        options = CompilerOptions(target=target_for(target))
        neuronx_cc.find_compiler()
        self.check(target_for(target))
        neffs = neuronx_cc.compile_programs({name: self.hlo(name) for name in missing}, options, jobs=jobs)
        self.neffs = {**self.neffs, **{name: partial(neffs.__getitem__, name) for name in neffs}}

    def bundle(self, parameters: Mapping[str, Sequence[np.ndarray]], own: range | None = None) -> Bundle:
        """The programs with their parameters: a part of each for each rank, or each of `own`, those of this process."""

        def neff(name: str) -> bytes | None:
            return self.neffs[name]() if name in self.neffs else None

        return Bundle(self.programs, self.hlo, neff, parameters, own)

    def run_on(
        self,
        backend: str,
        parameters: Mapping[str, Sequence[np.ndarray]],
        jobs: int | None = None,
        own: range | None = None,
    ) -> Runtime:
        """A runtime, "host" or "neuron", with the parameters on its devices; one of `own` ranks is "neuron"."""
        if backend == "neuron":
            self.compile(jobs=jobs)
            self._check_machine()
            runtime = _on_device(self.bundle(parameters, own))
            runtime.load(self.programs)
            return runtime
        from jx_neuron.runtime.host import HostRuntime

        return HostRuntime(self.bundle(parameters))

    def _check_machine(self) -> None:
        here, there = neuron.target(), self.settings.target
        if here and there and target_of(here).generation != target_of(there).generation:
            raise ArtifactError(
                f"the model was compiled for {there}, and this is a {here} instance; compile it with --target {here}"
            )


def _on_device(bundle: Bundle) -> Runtime:
    """A runtime of the library that runs NEFFs here."""
    if neuron.library() == "nrtpy":
        from jx_neuron.runtime.nrtpy import NrtpyRuntime

        return NrtpyRuntime(bundle)
    if bundle.own is not None:
        raise ConfigError(
            f"several hosts share a model through nrtpy alone; install it, and set {neuron.LIBRARY}=nrtpy"
        )
    return neuron.NeuronRuntime(bundle)


def lower(decoder: Any, settings: Settings, workers: int = 2) -> Deployment:
    """Lowers every program of `settings`."""
    from jx_neuron.lowering.model import lower_model

    keys = settings.programs
    slots, positions = settings.slots, settings.buckets.capacity
    lowered = list(lower_model(decoder, keys, slots, positions, settings.dtype, workers))
    by_name = {program.name: program.hlo_module for program in lowered}
    return Deployment(settings, dict(zip(keys, lowered, strict=True)), by_name.__getitem__)


def save(
    directory: Path | str,
    deployment: Deployment,
    config: Mapping[str, Any],
    parameters: Mapping[str, Sequence[np.ndarray]] | None,
    save_tokenizer: Callable[[Path], Sequence[Path]],
    ranks_per_host: int | None = None,
) -> Path:
    """Writes an artifact: programs, NEFFs where there are any, the tokenizer and, where given, parameters.

    save_tokenizer: writes the tokenizer's files into a folder and returns their paths.
    ranks_per_host: the ranks that each host is to run; None for any number.
    """
    with temporary_folder() as folder:
        extra = {path.relative_to(folder).as_posix(): path.read_bytes() for path in save_tokenizer(folder)}
    extra[CONFIG] = json.dumps(dict(config), indent=1).encode()
    return artifact.write(
        directory,
        settings=deployment.settings,
        config=config,
        programs=list(deployment.programs.values()),
        hlo=deployment.hlo,
        parameters=parameters,
        neffs={name: neff() for name, neff in deployment.neffs.items()},
        extra_files=extra,
        ranks_per_host=ranks_per_host,
    )


def config_of(model: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """The config in the manifest of a saved model; of any other model the result of `models.known.config_of`."""
    from jx_neuron.models import known

    if is_artifact(model):
        return dict(artifact.read(os.fspath(model)).manifest.config)
    return known.config_of(model, **options)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a saved model rather than a checkpoint."""
    return artifact.is_artifact(os.fspath(path))
