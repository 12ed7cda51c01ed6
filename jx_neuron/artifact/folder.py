"""A model ready to run, as a folder.

    manifest.json                    what everything is, with the size and sha256 of every file and of itself
    hlo/<program>.pb                 serialized HloModuleProtos
    neff/<program>.neff              what neuronx-cc made of them, where it has
    weights/rank-NN.safetensors      each core's parameters, where they are kept
    …                                files of the tokenizer

It is written whole or not at all, and nothing in it is believed before its hash is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from pydantic import ValidationError
from safetensors import safe_open

from jx_neuron.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    UNSEALED,
    FileRecord,
    Manifest,
    ProgramRecord,
    TensorRecord,
    is_inside,
    parameters_of,
    read_manifest,
    reason_of,
    sealed,
)
from jx_neuron.checkpoint.tensor_files import SAFETENSORS_DTYPES, write_safetensors
from jx_neuron.errors import ArtifactError
from jx_neuron.util.durable import replacing, settle, sync
from jx_neuron.util.parsing import boundary

if TYPE_CHECKING:  # what runs an artifact has no need of what makes programs
    from jx_neuron.lowering.program import Program

T = TypeVar("T")
TOOLS = ("jx-neuron", "jax", "jaxlib")
_ALTERED = "{} was altered: its sha256 is not the manifest's"


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest and programs have been checked."""

    directory: Path
    manifest: Manifest

    def program(self, name: str) -> ProgramRecord:
        """The program of that name. Raises ArtifactError where there is none."""
        for program in self.manifest.programs:
            if program.name == name:
                return program
        names = ", ".join(program.name for program in self.manifest.programs)
        raise self._refusal(f"there is no program {name!r}, only {names}")

    def hlo(self, name: str) -> bytes:
        """The serialized HloModuleProto of a program."""
        return self.file(self.program(name).hlo)

    def neff(self, name: str) -> bytes | None:
        """The NEFF of a program, or None where it was saved without."""
        path = self.program(name).neff
        return self.file(path) if path else None

    def file(self, name: str) -> bytes:
        """The content of a file, such as tokenizer.json. Raises ArtifactError if missing or altered."""
        path, record = self._locate(name)
        with boundary(path, ArtifactError):
            data = path.read_bytes()
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._refusal(_ALTERED.format(name))
        return data

    def weights(self, rank: int) -> Mapping[str, np.ndarray]:
        """The parameters of one core by name, each read when asked for; the file's hash is checked first.

        Raises ArtifactError where there is no such rank, no weights at all, or the file was altered.
        """
        if not self.manifest.weights:
            raise self._refusal("it was saved without weights", "Save with sharded_weights=True, or load a checkpoint")
        if not 0 <= rank < self.manifest.tp_degree:
            raise self._refusal(f"there is no rank {rank} at tp degree {self.manifest.tp_degree}")
        name = self.manifest.weights[rank]
        path, record = self._locate(name)
        with boundary(path, ArtifactError), open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise self._refusal(_ALTERED.format(name))
            tensors = _Tensors(path)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise self._refusal(f"{name} was replaced while it was read", "Open it again")
            _check_tensors(self.manifest.parameters, {key: tensors.layout(key) for key in tensors}, str(path))
        return tensors

    def check(self) -> None:
        """Refuses the artifact unless every file is there in full size and the programs are unaltered."""
        for name in self.manifest.files:
            self._locate(name)
        for program in self.manifest.programs:
            self.file(program.hlo)

    def _locate(self, name: str) -> tuple[Path, FileRecord]:
        record = self.manifest.files.get(name)
        if record is None:
            raise self._refusal(f"the manifest lists no file {name}")
        path = self.directory / name
        with boundary(path, ArtifactError):
            if not path.is_file():
                raise self._refusal(f"{name} is missing")
            if path.resolve() != self.directory.resolve() / name:
                raise self._refusal(f"{name} is a link to elsewhere")
            if (size := path.stat().st_size) != record.size:
                raise self._refusal(f"{name} has {size} bytes, not the manifest's {record.size}")
        return path, record

    def _refusal(self, reason: str, way_out: str = "Save it again, or fetch a whole copy") -> ArtifactError:
        return ArtifactError(f"artifact {self.directory}: {reason}. {way_out}")


def read(directory: Path | str) -> Artifact:
    """Opens an artifact.

    Raises ArtifactError, with the reason, unless the manifest is sound and of a known format, every file is
    there in full size, and every program has its hash. NEFFs, weights and other files are checked when they
    are read.
    """
    directory = _folder(directory)

    def whole() -> Artifact:
        artifact = Artifact(directory, read_manifest(directory))
        artifact.check()
        return artifact

    with boundary(directory, ArtifactError):
        return _once_settled(directory, whole)


def is_artifact(directory: Path | str) -> bool:
    """Whether there is an artifact, sound or not."""
    try:
        directory = _folder(directory)
        settle(directory)
        return (directory / MANIFEST).is_file()
    except (ArtifactError, OSError):
        return False


def write(
    directory: Path | str,
    *,
    model_type: str,
    config: Mapping[str, Any],
    neuron: Mapping[str, Any],
    programs: Sequence[Program],
    weights: Callable[[int], Mapping[str, np.ndarray]] | None = None,
    neffs: Mapping[str, bytes] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    tools: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes an artifact, in place of one that is there, and gives its folder.

    Args:
      config, neuron: the model's and the Neuron configuration, as JSON; neuron["tp_degree"] cores run it.
      weights: gives a rank's parameters, just those that are "param" inputs of the programs; called rank by
        rank.
      neffs: by program name; programs may lack one.
      extra_files: content by path inside the artifact.
      tools: versions to note beside those of jx-neuron and JAX, such as {"neuronx-cc": "2.21"}.

    Raises ArtifactError where the parts do not fit together, the folder holds anything but an artifact, or the disk
    refuses it. What was there before is intact then.
    """
    directory = _folder(directory)
    neffs = neffs or {}
    tp_degree = neuron.get("tp_degree")
    if not isinstance(tp_degree, int) or any(program.tp_degree != tp_degree for program in programs):
        raise ArtifactError(f"neuron['tp_degree'] is {tp_degree!r}, which is not the degree of every program")
    if unknown := sorted(set(neffs) - {program.name for program in programs}):
        raise ArtifactError(f"there is a NEFF of {unknown[0]!r}, but no such program")
    check_replaceable(directory, overwrite)
    with _writing(directory), replacing(directory) as folder:
        stage = _Stage(folder)
        try:
            records = tuple(stage.program(program, neffs.get(program.name)) for program in programs)
            parameters = parameters_of(records)
            for path, data in (extra_files or {}).items():
                stage.put(path, data)
            manifest = Manifest(
                sha256=UNSEALED,
                format_version=FORMAT_VERSION,
                model_type=model_type,
                tp_degree=tp_degree,
                config=_json(config),
                neuron=_json(neuron),
                programs=records,
                weights=tuple(stage.weights(rank, weights(rank), parameters) for rank in range(tp_degree))
                if weights
                else (),
                tools={name: _version(name) for name in TOOLS} | dict(tools or {}),
                files=stage.files,
            )
        except ValidationError as error:
            raise ArtifactError(f"no artifact can be made of this: {reason_of(error)}") from error
        stage.put(MANIFEST, sealed(manifest))
    return directory


@dataclass(frozen=True)
class _Stage:
    """A folder that becomes an artifact, and what has been put into it."""

    folder: Path
    files: dict[str, FileRecord] = field(default_factory=dict)

    def put(self, path: str, content: bytes | Callable[[Path], object]) -> str:
        if not is_inside(path) or path in self.files:
            raise ArtifactError(f"no file of an artifact can be called {path!r}, or two are")
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            content(target)
        sync(target)
        self.files[path] = FileRecord(size=target.stat().st_size, sha256=_digest(target))
        return path

    def program(self, program: Program, neff: bytes | None) -> ProgramRecord:
        return ProgramRecord(
            name=program.name,
            hlo=self.put(f"hlo/{program.name}.pb", program.hlo_module),
            neff=None if neff is None else self.put(f"neff/{program.name}.neff", neff),
            inputs=tuple(map(TensorRecord.model_validate, program.inputs)),
            outputs=tuple(map(TensorRecord.model_validate, program.outputs)),
        )

    def weights(self, rank: int, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, TensorRecord]) -> str:
        arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
        path = f"weights/rank-{rank:02d}.safetensors"
        _check_tensors(parameters, {name: (array.dtype.name, array.shape) for name, array in arrays.items()}, path)
        return self.put(path, lambda target: write_safetensors(target, arrays))


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, each read from the disk when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safe_open(path, framework="np"))
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return np.asarray(self._file.get_tensor(name))

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape, as the file's header says."""
        part = self._file.get_slice(name)
        return np.dtype(SAFETENSORS_DTYPES[part.get_dtype()]).name, tuple(part.get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _check_tensors(
    parameters: Mapping[str, TensorRecord], layouts: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    """Refuses weights, each a (dtype, shape) by name, that are not the programs' parameters."""
    for name in sorted(set(parameters) ^ set(layouts)):
        raise ArtifactError(f"{where}: {name} is {'missing' if name in parameters else 'no parameter of the programs'}")
    for name, tensor in parameters.items():
        dtype, shape = layouts[name]
        if (dtype, shape) != (tensor.dtype, tensor.shape):
            raise ArtifactError(f"{where}: {name} is {dtype}{list(shape)}, not {tensor.dtype}{list(tensor.shape)}")


def check_replaceable(directory: Path | str, overwrite: bool = True) -> None:
    """Raises ArtifactError where `write` would: where anything but an artifact would be lost, or no folder can be."""
    directory = _folder(directory)

    def check() -> None:
        parent = next(path for path in directory.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ArtifactError(f"{directory} cannot be written: {parent} is no folder that can. Choose another")
        if not directory.exists():
            return
        if not directory.is_dir():
            raise ArtifactError(f"{directory} is a file. Choose a folder")
        present = {
            Path(folder, name).relative_to(directory).as_posix()
            for folder, _, names in os.walk(directory)
            for name in names
        }
        if present and not overwrite:
            raise ArtifactError(f"{directory} is not empty. Choose another folder, or allow overwriting")
        try:
            foreign = sorted(present - set(read_manifest(directory).files) - {MANIFEST}) if present else ()
        except ArtifactError as error:
            raise ArtifactError(f"{directory} holds no artifact to replace. Choose another folder ({error})") from error
        if foreign:
            raise ArtifactError(f"{directory} holds {foreign[0]}, which is no part of its artifact. Move it elsewhere")

    with _writing(directory):
        _once_settled(directory, check)


def _folder(directory: Path | str) -> Path:
    try:
        return Path(directory).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{str(directory)!r} is no path of a folder ({error}). Choose another") from error


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Has what the disk refuses become an ArtifactError."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written ({error.strerror or error}), and is as it was. "
            "Make room there, or choose another folder"
        ) from error


def _once_settled(directory: Path, look: Callable[[], T]) -> T:
    """What `look` gives, again where another process put a folder in the place of `directory` while it looked."""
    while True:
        settle(directory)
        before = _identity(directory)
        try:
            return look()
        except ArtifactError:
            if _identity(directory) == before:
                raise


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"a configuration cannot be kept as JSON: {error}") from error
    return plain


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
