"""A model ready to run, as a folder.

    manifest.json                    settings and programs; the size and sha256 of every file and of the manifest
    hlo/<program>.pb                 serialized HloModuleProtos
    neff/<program>.neff              compiled programs, where neuronx-cc has run
    weights/rank-NN.safetensors      each core's parameters, where they are saved
    …                                files of the tokenizer

It is written atomically, and no file is used before its hash is checked.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from safetensors import safe_open

from jx_neuron.artifact.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    hlo_file,
    neff_file,
    read_manifest,
)
from jx_neuron.checkpoint.tensor_files import SAFETENSORS_DTYPES
from jx_neuron.errors import ArtifactError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.util.durable import settle
from jx_neuron.util.ondemand import OnDemand
from jx_neuron.util.parsing import boundary

T = TypeVar("T")
_ALTERED = "{} was altered: its sha256 is not the manifest's"


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest and programs have been checked."""

    directory: Path
    manifest: Manifest

    def program(self, name: str) -> ProgramSpec:
        """The program of that name. Raises ArtifactError where there is none."""
        for program in self.manifest.programs:
            if program.name == name:
                return program
        names = ", ".join(program.name for program in self.manifest.programs)
        raise self._refusal(f"there is no program {name!r}, only {names}")

    def hlo(self, name: str) -> bytes:
        """The serialized HloModuleProto of a program."""
        return self.file(hlo_file(self.program(name).name))

    def neff(self, name: str) -> bytes | None:
        """The NEFF of a program; None where the artifact has none."""
        path = neff_file(self.program(name).name)
        return self.file(path) if path in self.manifest.files else None

    def file(self, name: str) -> bytes:
        """The content of a file, such as tokenizer.json. Raises ArtifactError if missing or altered."""
        path, record = self._locate(name)
        with boundary(path, ArtifactError):
            data = path.read_bytes()
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._refusal(_ALTERED.format(name))
        return data

    def weights(self, rank: int) -> Mapping[str, np.ndarray]:
        """The parameters of one core by name, each read at access; the file's hash is checked first.

        Raises ArtifactError where there is no such rank, there are no weights, or the file was altered.
        """
        if not self.manifest.weights:
            raise self._refusal("it was saved without weights", "Save with sharded_weights=True, or load a checkpoint")
        if not 0 <= rank < len(self.manifest.weights):
            raise self._refusal(f"there is no rank {rank} at tp degree {len(self.manifest.weights)}")
        name = self.manifest.weights[rank]
        path, record = self._locate(name)
        with boundary(path, ArtifactError), open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise self._refusal(_ALTERED.format(name))
            tensors = cast(Any, safe_open(path, framework="np"))
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise self._refusal(f"{name} was replaced while it was read", "Open it again")
            parameters, names = self.manifest.parameters, frozenset(tensors.keys())
            check_names(parameters, names, str(path))
            for key, spec in parameters.items():
                part = tensors.get_slice(key)
                dtype = np.dtype(SAFETENSORS_DTYPES[part.get_dtype()]).name
                dtype = spec.dtype if dtype == in_file(spec.dtype) else dtype
                check_layout(spec, dtype, tuple(part.get_shape()), str(path))
        return OnDemand(sorted(names), lambda key: np.asarray(tensors.get_tensor(key)).view(parameters[key].dtype))

    def parameters(self, own: range | None = None) -> Mapping[str, list[np.ndarray]]:
        """The parts of each parameter that the ranks `own` have, or all, read at access.

        The first access checks the files of these ranks (`weights`).
        """

        @cache
        def ranks() -> list[Mapping[str, np.ndarray]]:
            return [self.weights(rank) for rank in own or range(max(1, len(self.manifest.weights)))]

        return OnDemand(sorted(self.manifest.parameters), lambda name: [weights[name] for weights in ranks()])

    def check(self) -> None:
        """Raises ArtifactError unless every file has its recorded size and the programs are unaltered."""
        for name in self.manifest.files:
            self._locate(name)
        for program in self.manifest.programs:
            self.file(hlo_file(program.name))

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

    Raises ArtifactError, with the reason, unless the manifest is valid and of a known format, every file has its
    recorded size, and every program its hash. NEFFs, weights and other files are checked when they are read.
    """
    directory = resolved(directory)

    def whole() -> Artifact:
        artifact = Artifact(directory, read_manifest(directory))
        artifact.check()
        return artifact

    with boundary(directory, ArtifactError):
        return retry_if_replaced(directory, whole)


def is_artifact(directory: Path | str) -> bool:
    """Whether the folder holds an artifact, valid or not."""
    try:
        directory = resolved(directory)
        settle(directory)
        return (directory / MANIFEST).is_file()
    except (ArtifactError, OSError):
        return False


def in_file(dtype: str) -> str:
    """The dtype that a file of weights has for a parameter's: the bits, where safetensors has no such numbers."""
    return "uint8" if dtype == "float8_e4m3" else dtype


def check_names(parameters: Collection[str], names: Collection[str], where: str) -> None:
    """Raises ArtifactError unless the names of the weights are those of the programs' parameters."""
    for name in sorted(set(parameters) ^ set(names)):
        raise ArtifactError(f"{where}: {name} is {'missing' if name in parameters else 'no parameter of the programs'}")


def check_layout(spec: TensorSpec, dtype: str, shape: tuple[int, ...], where: str) -> None:
    """Raises ArtifactError unless one rank's part of a parameter has the dtype and shape that the programs take."""
    if (dtype, shape) != (spec.dtype, spec.shape):
        raise ArtifactError(f"{where}: {spec.name} is {dtype}{list(shape)}, not {spec.dtype}{list(spec.shape)}")


def resolved(directory: Path | str) -> Path:
    """The folder with links resolved. Raises ArtifactError for what cannot be a path."""
    try:
        return Path(directory).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{str(directory)!r} is no path of a folder ({error}). Choose another") from error


def retry_if_replaced(directory: Path, look: Callable[[], T]) -> T:
    """Returns look(), retried where another process replaced `directory` meanwhile."""
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
