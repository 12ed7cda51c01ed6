"""Between a decoder and what runs it: lowering, checking, compiling, saving, and opening what was saved."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from jx_neuron.artifact import folder as artifact
from jx_neuron.artifact.fit import check_fit
from jx_neuron.artifact.folder import Artifact
from jx_neuron.artifact.manifest import Degree, reason_of
from jx_neuron.checkpoint.folder import CONFIG, TOKENIZER_FILES
from jx_neuron.compiler import neuronx_cc
from jx_neuron.compiler.neuronx_cc import CompilerOptions
from jx_neuron.config import dtype_of
from jx_neuron.errors import ArtifactError, ConfigError, LoweringError
from jx_neuron.lowering.verify.checking import Violation, verify
from jx_neuron.lowering.verify.rules import target_of
from jx_neuron.runtime import Runtime, neuron
from jx_neuron.runtime.bundle import Bundle, Lowered
from jx_neuron.step.buckets import Buckets
from jx_neuron.step.shape import Shape
from jx_neuron.util.temporary import temporary_folder

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


MOST = 2**31 - 1  # the greatest int32

Positive = Annotated[int, Field(ge=1, le=MOST)]


def _ascending(sizes: tuple[int, ...]) -> None:
    if not sizes or sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
        raise ValueError(f"{sizes} does not ascend from 1 or more")


def _legal(check: Callable[[Any], Any]) -> AfterValidator:
    """Takes what `check` does not refuse, as it is."""
    return AfterValidator(lambda value: (check(value), value)[1])


def _generation(content: Mapping[str, Any]) -> None:
    def is_id(value: Any) -> bool:
        return type(value) is int and -1 <= value <= MOST  # -1 in configs that mean none

    for name, value in content.items():
        several = name == "eos_token_id" and isinstance(value, list) and all(map(is_id, value))
        if name not in ("eos_token_id", "pad_token_id") or not (value is None or is_id(value) or several):
            raise ValueError(f"{name}={value!r} is no token id")


def _buckets(buckets: Buckets) -> None:
    _ascending(buckets.context)
    _ascending(buckets.tokens)
    if buckets.context[-1] > buckets.capacity or buckets.capacity > MOST:
        raise ValueError(f"{buckets} has prompts longer than its sequences, or positions beyond {MOST}")


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
    tp_degree: Degree
    amp: Annotated[str, _legal(dtype_of)]
    batch_sizes: Annotated[tuple[Positive, ...], _legal(_ascending)]
    buckets: Annotated[Buckets, _legal(_buckets)]
    candidates: Positive
    all_logits: bool
    vocab_size: Positive
    generation: Annotated[Mapping[str, Any], _legal(_generation)] = field(default_factory=dict)
    target: Annotated[str, _legal(target_of)] | None = None
    prompt_batch: Positive | None = None
    rotations: tuple[Positive, bool] | None = None

    __pydantic_config__ = ConfigDict(extra="forbid")

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
    def from_dict(cls, content: Mapping[str, Any]) -> "Settings":
        """Raises ArtifactError, with the reason, for a form that `as_dict` does not give."""
        try:
            settings: Settings = _settings_reader().validate_json(json.dumps(content), strict=True)
        except (ValidationError, TypeError) as error:
            reason = reason_of(error) if isinstance(error, ValidationError) else error
            raise ArtifactError(f"the settings are not those of a model ({reason})") from error
        if settings.candidates > settings.vocab_size:
            raise ArtifactError(f"{settings.candidates} candidates of {settings.vocab_size} tokens")
        if settings.prompt_batch and (len(settings.batch_sizes) > 1 or settings.batch_sizes[0] % settings.prompt_batch):
            raise ArtifactError(f"prompts of {settings.prompt_batch} rows do not divide batches {settings.batch_sizes}")
        return settings


@cache
def _settings_reader() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)


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
    with temporary_folder() as folder:
        extra = {path.name: path.read_bytes() for path in (save_tokenizer(folder) if save_tokenizer else ())}
    extra[CONFIG] = json.dumps(dict(config), indent=1).encode()
    settings = deployment.settings.as_dict()
    Settings.from_dict(settings)
    return artifact.write(
        directory,
        model_type=deployment.settings.model_type,
        config=config,
        neuron=settings,
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
        """Raises ArtifactError where they are no model's, or another's than the manifest's."""
        manifest = self.artifact.manifest
        with self._named():
            settings = Settings.from_dict(manifest.neuron)
        if (settings.model_type, settings.tp_degree) != (manifest.model_type, manifest.tp_degree):
            raise self._refusal(f"its settings are for {settings.model_type} on {settings.tp_degree} cores")
        return settings

    @cached_property
    def deployment(self) -> Deployment:
        """Raises ArtifactError unless each program that the settings call for is there, and is what its name says."""
        settings, manifest = self.settings, self.artifact.manifest
        records = {record.name: record for record in manifest.programs}
        buckets = settings.buckets
        if len(settings.batch_sizes) * max(len(buckets.tokens), len(buckets.context) - 1) > len(records):
            raise self._refusal(f"it has {len(records)} programs, which is fewer than its buckets")
        programs: dict[Shape, Any] = {}
        for shape in settings.shapes:
            if shape.name not in records:
                raise self._refusal(f"it lacks the program {shape.name}")
            programs[shape] = record = records[shape.name]
            hlo = self.artifact.hlo(record.name)
            with self._named():
                check_fit(
                    record,
                    hlo,
                    shape,
                    slots=buckets.capacity,
                    dtype=settings.dtype,
                    vocab_size=settings.vocab_size,
                    tp_degree=settings.tp_degree,
                )
        neffs = {
            name: (lambda name=name: self.artifact.neff(name) or b"") for name, record in records.items() if record.neff
        }
        return Deployment(settings, programs, self.artifact.hlo, neffs)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Has errors name the folder."""
        try:
            yield
        except ArtifactError as error:
            raise self._refusal(str(error)) from error

    def _refusal(self, reason: str) -> ArtifactError:
        return ArtifactError(f"artifact {self.artifact.directory}: {reason}; save it again")

    @property
    def weights(self) -> Callable[[int], Mapping[str, np.ndarray]] | None:
        """Each rank's parameters, or None where they were not saved."""
        return self.artifact.weights if self.artifact.manifest.weights else None

    def tokenizer(self) -> Any:
        """The tokenizer of the listed files, checked. Raises ArtifactError where there is none."""
        from jx_neuron.checkpoint.tokenizer import load_tokenizer

        directory, manifest = self.artifact.directory, self.artifact.manifest
        if not set(TOKENIZER_FILES) & set(manifest.files):
            raise ArtifactError(f"artifact {directory} was saved without a tokenizer; use token ids")
        return load_tokenizer(directory, manifest.config, self.save_tokenizer, ArtifactError)

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Writes the listed files of the tokenizer, checked, into `folder`."""
        paths = [folder / name for name in TOKENIZER_FILES if name in self.artifact.manifest.files]
        for path in paths:
            path.write_bytes(self.artifact.file(path.name))
        return paths


def config_of(model: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """The config of a saved model, as its manifest has it; of anything else what `models.known.config_of` gives."""
    from jx_neuron.models import known

    if is_artifact(model):
        return dict(artifact.read(os.fspath(model)).manifest.config)
    return known.config_of(model, **options)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a saved model rather than a checkpoint."""
    return artifact.is_artifact(os.fspath(path))


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
