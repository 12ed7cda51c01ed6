"""Between a decoder and what runs it: lowering, checking, compiling, saving, and opening what was saved."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.checkpoint import CONFIG
from jx_neuron.config import dtype_of
from jx_neuron.errors import ArtifactError, ConfigError, LoweringError
from jx_neuron.lowering import artifact, neuronx_cc
from jx_neuron.lowering.artifact import Artifact
from jx_neuron.lowering.buckets import Buckets
from jx_neuron.lowering.manifest import MANIFEST
from jx_neuron.lowering.neuronx_cc import CompilerOptions
from jx_neuron.lowering.rules import target_of
from jx_neuron.lowering.shape import Shape
from jx_neuron.lowering.verify import Violation, verify
from jx_neuron.runtime import Runtime, neuron
from jx_neuron.runtime.bundle import Bundle, Lowered

BACKENDS = ("xla", "host", "neuron")


def choose_backend(asked: str | None) -> str:
    """`asked`, or else neuron where torch-neuronx and a NeuronCore are present, or else xla.

    Raises ConfigError for a backend that does not exist.
    """
    if asked is None:
        return "neuron" if neuron.available() else "xla"
    if asked not in BACKENDS:
        raise ConfigError(f"backend={asked!r} does not exist; it may be one of {', '.join(BACKENDS)}")
    return asked


def target_for(asked: str | None) -> str:
    """The instance family `asked` for, or that of NEURON_CC_FLAGS, or this machine's, or trn1.

    Raises CompilerError where the first two differ, and LoweringError for one that does not exist.
    """
    machine = None if neuronx_cc.asked_target() else neuron.target()
    return target_of(neuronx_cc.target(CompilerOptions(target=asked or machine))).name


@dataclass(frozen=True)
class Settings:
    """What a model was, or is to be, lowered for.

    batch_sizes:  rows of its programs, ascending.
    generation:   the ids of its end and padding tokens.
    target:       the instance family that the programs were checked and compiled for; None before that.
    prompt_batch: rows of the programs that take prompts, where those that decode have more.
    rotations:    where RoPE depends on the length of the prompt: the fields of `Rotations`.
    """

    model_type: str
    tp_degree: int
    amp: str
    batch_sizes: tuple[int, ...]
    buckets: Buckets
    candidates: int
    all_logits: bool
    vocab_size: int
    generation: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    prompt_batch: int | None = None
    rotations: tuple[int, bool] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.amp)

    @property
    def shapes(self) -> list[Shape]:
        """Every program that such a model can call for."""
        found = [shape for batch in self.batch_sizes for shape in self.buckets.shapes(batch, self.candidates)]
        if self.prompt_batch:
            decoding = [shape for shape in found if shape.tokens == 1]
            found = list(dict.fromkeys([*self.buckets.shapes(self.prompt_batch, self.candidates), *decoding]))
        if self.all_logits:
            found += [dataclasses.replace(shape, all_logits=True) for shape in found if shape.tokens > 1]
        return found

    def as_dict(self) -> dict[str, Any]:
        """The form that a manifest keeps."""
        return dataclasses.asdict(self)

    def demand(self, tp_degree: int, amp: str, batch_size: Any, n_positions: Any, context_length_estimate: Any) -> None:
        """Raises ArtifactError for an argument of from_pretrained that is given, and not what was saved."""
        tokens = None if n_positions is None else Buckets.of(n_positions).tokens
        context = None if context_length_estimate is None else Buckets.of(self.buckets.tokens, context_length_estimate)
        for name, asked, default, mine in (
            ("tp_degree", tp_degree, 1, self.tp_degree),
            ("amp", dtype_of(amp), dtype_of("f32"), self.dtype),
            ("batch_size", tuple(np.atleast_1d(batch_size).tolist()), (1,), tuple(self.batch_sizes)),
            ("n_positions", tokens, None, self.buckets.tokens),
            ("context_length_estimate", context and context.context, None, self.buckets.context),
        ):
            if asked not in (default, mine):
                raise ArtifactError(f"it was saved for {name}={mine} and not {asked}; leave that out, or save anew")

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Settings":
        """Raises ArtifactError for a form that `as_dict` does not give."""
        try:
            buckets = Buckets(*(tuple(told["buckets"][key]) for key in ("context", "tokens")))
            rotations = None if told.get("rotations") is None else tuple(told["rotations"])
            lists = {"buckets": buckets, "batch_sizes": tuple(told["batch_sizes"]), "rotations": rotations}
            return cls(**{**told, **lists})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"the manifest's settings are not those of a model ({error}); save it again") from error


@dataclass
class Deployment:
    """Programs of a model, lowered and perhaps compiled, by shape."""

    settings: Settings
    programs: Mapping[Shape, Lowered]
    hlo: Callable[[str], bytes]
    neffs: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def violations(self, target: str, lnc: int | None = None) -> Iterator[tuple[str, list[Violation]]]:
        """What neuronx-cc is documented to refuse on a target, program by program."""
        for program in self.programs.values():
            sources = getattr(program, "sources", None)
            yield program.name, verify(self.hlo(program.name), target, lnc=lnc, sources=sources)

    def check(self, target: str) -> None:
        """Notes what the programs are for. Raises LoweringError with all that neuronx-cc would refuse there."""
        wrong = [f"{name}: {v}" for name, found in self.violations(target) for v in found if v.severity == "error"]
        if wrong:
            raise LoweringError(f"neuronx-cc would refuse the model for {target}:\n" + "\n".join(wrong))
        self.settings = dataclasses.replace(self.settings, target=target)

    def compile(self, target: str | None = None, jobs: int | None = None) -> None:
        """Has neuronx-cc compile each program that has no NEFF yet, once all are checked.

        target: an instance family, as `target_for` takes it.

        Raises LoweringError for programs that cannot compile there, and CompilerError where the compiler is missing or
        fails.
        """
        missing = [p.name for p in self.programs.values() if p.name not in self.neffs]
        if not missing:
            return
        options = CompilerOptions(target=target_for(target))
        neuronx_cc.find_compiler()
        self.check(target_for(target))
        made = neuronx_cc.compile_programs({name: self.hlo(name) for name in missing}, options, jobs=jobs)
        self.neffs = {**self.neffs, **{name: partial(made.__getitem__, name) for name in made}}

    def bundle(self, weights: Callable[[int], Mapping[str, np.ndarray]]) -> Bundle:
        """The programs with weights to run them on."""

        def neff(name: str) -> bytes | None:
            return self.neffs[name]() if name in self.neffs else None

        return Bundle(self.settings.tp_degree, self.programs, self.hlo, neff, weights)

    def run_on(
        self, backend: str, weights: Callable[[int], Mapping[str, np.ndarray]], jobs: int | None = None
    ) -> Runtime:
        """A runtime, "host" or "neuron", with weights on its devices."""
        if backend == "neuron":
            self.compile(jobs=jobs)
            self._check_machine()
            runtime = neuron.NeuronRuntime(self.bundle(weights))
            runtime.compile(list(self.programs))
            return runtime
        from jx_neuron.runtime.host import HostRuntime

        return HostRuntime(self.bundle(weights))

    def _check_machine(self) -> None:
        here, there = neuron.target(), self.settings.target
        if here and there and target_of(here).generation != target_of(there).generation:
            raise ArtifactError(
                f"the model was compiled for {there}, and this is a {here} instance; compile it with --target {here}"
            )


def lower(decoder: Any, settings: Settings, workers: int = 2) -> Deployment:
    """Lowers every program of `settings`."""
    from jx_neuron.lowering.model import lower_model

    shapes = settings.shapes
    lowered = list(lower_model(decoder, shapes, settings.buckets.capacity, settings.dtype, workers))
    by_name = {program.name: program.hlo_module for program in lowered}
    return Deployment(settings, dict(zip(shapes, lowered, strict=True)), by_name.__getitem__)


def save(
    directory: Path | str,
    deployment: Deployment,
    config: Mapping[str, Any],
    weights: Callable[[int], Mapping[str, np.ndarray]] | None,
    save_tokenizer: Callable[[Path], Sequence[Path]] | None,
) -> Path:
    """Writes an artifact: programs, NEFFs where there are any, the tokenizer, and weights where given."""
    with tempfile.TemporaryDirectory() as folder:
        extra = {path.name: path.read_bytes() for path in (save_tokenizer(Path(folder)) if save_tokenizer else ())}
    extra[CONFIG] = json.dumps(dict(config), indent=1).encode()
    return artifact.write(
        directory,
        model_type=deployment.settings.model_type,
        config=config,
        neuron=deployment.settings.as_dict(),
        programs=[_with_hlo(program, deployment) for program in deployment.programs.values()],  # type: ignore[misc]
        weights=weights,
        neffs={name: neff() for name, neff in deployment.neffs.items()},
        extra_files=extra,
    )


@dataclass(frozen=True)
class Saved:
    """A model opened from an artifact: all that is needed to run it."""

    artifact: Artifact

    @classmethod
    def open(cls, directory: Path | str) -> "Saved":
        """Raises ArtifactError with the reason where it is not whole."""
        return cls(artifact.read(directory))

    @cached_property
    def settings(self) -> Settings:
        return Settings.from_dict(self.artifact.manifest.neuron)

    @cached_property
    def deployment(self) -> Deployment:
        records = {record.name: record for record in self.artifact.manifest.programs}
        shapes = {shape: shape.name for shape in self.settings.shapes}
        if absent := sorted(set(shapes.values()) - set(records)):
            raise ArtifactError(f"artifact {self.artifact.directory} lacks the program {absent[0]}; save it again")
        neffs = {
            name: (lambda name=name: self.artifact.neff(name) or b"") for name, record in records.items() if record.neff
        }
        programs = {shape: records[name] for shape, name in shapes.items()}
        return Deployment(self.settings, programs, self.artifact.hlo, neffs)

    @property
    def weights(self) -> Callable[[int], Mapping[str, np.ndarray]] | None:
        """Each rank's parameters, or None where they were not saved."""
        return self.artifact.weights if self.artifact.manifest.weights else None

    def tokenizer(self) -> Any:
        """The tokenizer that was saved, its files checked. Raises ArtifactError where there is none."""
        from transformers import AutoTokenizer

        if not self._tokenizer_files():
            raise ArtifactError(f"artifact {self.artifact.directory} was saved without a tokenizer; use token ids")
        return AutoTokenizer.from_pretrained(self.artifact.directory, local_files_only=True)

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Writes the files of the tokenizer, checked, into `folder`."""
        for name, content in (files := self._tokenizer_files()).items():
            (folder / name).write_bytes(content)
        return [folder / name for name in files]

    def _tokenizer_files(self) -> dict[str, bytes]:
        names = (name for name in self.artifact.manifest.files if "/" not in name and name != CONFIG)
        return {name: self.artifact.file(name) for name in names}


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a saved model rather than a checkpoint."""
    return (Path(path).expanduser() / MANIFEST).is_file()


@dataclass(frozen=True)
class _Writable:
    """A program as `artifact.write` takes it."""

    name: str
    tp_degree: int
    hlo_module: bytes
    inputs: Sequence[Any]
    outputs: Sequence[Any]


def _with_hlo(program: Lowered, deployment: Deployment) -> _Writable:
    return _Writable(
        program.name, deployment.settings.tp_degree, deployment.hlo(program.name), program.inputs, program.outputs
    )
