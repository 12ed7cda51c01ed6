"""Writing an artifact atomically."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import ValidationError

from jx_neuron.artifact.folder import check_layout, check_names, in_file, resolved, retry_if_replaced
from jx_neuron.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    UNSEALED,
    FileRecord,
    Manifest,
    files_in,
    hlo_file,
    is_inside,
    neff_file,
    parameters_of,
    reason_of,
    sealed,
)
from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.safetensors_writing import write_safetensors
from jx_neuron.errors import ArtifactError
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.util.durable import replacing, sync

TOOLS = ("jx-neuron", "jax", "jaxlib")


def write(
    directory: Path | str,
    *,
    settings: Settings,
    config: Mapping[str, Any],
    programs: Sequence[ProgramSpec],
    hlo: Callable[[str], bytes],
    parameters: Mapping[str, Sequence[np.ndarray]] | None = None,
    neffs: Mapping[str, bytes] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    tools: Mapping[str, str] | None = None,
    ranks_per_host: int | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes an artifact, replacing an existing one, and returns its folder.

    Args:
      config: the model's, as JSON.
      hlo: returns a program's serialized HloModuleProto by name.
      parameters: each rank's part of each parameter, exactly the "param" inputs of the programs. Each is read once, and
        freed when it is written.
      neffs: by program name; programs may lack one.
      extra_files: content by path inside the artifact.
      tools: versions to record besides those of jx-neuron and JAX, such as {"neuronx-cc": "2.21"}.
      ranks_per_host: the ranks that each host is to run; None for any number.

    Raises ArtifactError where the parts do not fit together, the folder holds anything but an artifact, or the disk
    refuses it. The former content of the folder is then intact.
    """
    directory, neffs = resolved(directory), neffs or {}
    if any(program.tp_degree != settings.tp_degree for program in programs):
        raise ArtifactError(f"the settings' tp_degree={settings.tp_degree} is not the degree of every program")
    if unknown := sorted(set(neffs) - {program.name for program in programs}):
        raise ArtifactError(f"there is a NEFF of {unknown[0]!r}, but no such program")
    check_replaceable(directory, overwrite)
    with writing(directory), replacing(directory) as folder:
        stage = _Stage(folder)
        for program in programs:
            stage.put(hlo_file(program.name), hlo(program.name))
        for name, neff in neffs.items():
            stage.put(neff_file(name), neff)
        for path, data in (extra_files or {}).items():
            stage.put(path, data)
        try:
            manifest = Manifest(
                sha256=UNSEALED,
                format_version=FORMAT_VERSION,
                config=_json(config),
                settings=settings,
                programs=tuple(programs),
                weights=()
                if parameters is None
                else stage.weights(parameters, parameters_of(programs), settings.tp_degree),
                tools={name: _version(name) for name in TOOLS} | dict(tools or {}),
                files=stage.files,
                ranks_per_host=ranks_per_host,
            )
        except ValidationError as error:
            raise ArtifactError(f"no artifact can be made of this: {reason_of(error)}") from error
        stage.put(MANIFEST, sealed(manifest))
    return directory


@dataclass(frozen=True)
class _Stage:
    """A folder that becomes an artifact, and the records of its files."""

    folder: Path
    files: dict[str, FileRecord] = field(default_factory=dict)

    @contextmanager
    def file(self, path: str) -> "Iterator[_Hashing]":
        if not is_inside(path) or path in self.files:
            raise ArtifactError(f"no file of an artifact can be called {path!r}, or two are")
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as opened:
            file = _Hashing(opened)
            yield file
        sync(target)
        self.files[path] = FileRecord(size=file.size, sha256=file.sha256.hexdigest())

    def put(self, path: str, content: bytes) -> None:
        with self.file(path) as file:
            file.write(content)

    def weights(
        self, parameters: Mapping[str, Sequence[np.ndarray]], specs: Mapping[str, TensorSpec], ranks: int
    ) -> tuple[str, ...]:
        """Writes one file a rank, parameter by parameter."""
        paths = tuple(f"weights/rank-{rank:02d}.safetensors" for rank in range(ranks))
        layouts = {name: (in_file(spec.dtype), spec.shape) for name, spec in specs.items()}
        check_names(specs, parameters, "weights")

        def parts(name: str) -> list[np.ndarray]:
            arrays = [np.asarray(array, order="C") for array in parameters[name]]
            if len(arrays) != ranks:
                raise ArtifactError(f"weights: {name} has {len(arrays)} parts, and there are {ranks} ranks")
            for array in arrays:
                check_layout(specs[name], array.dtype.name, array.shape, "weights")
            return arrays

        with ExitStack() as stack:
            write_safetensors([stack.enter_context(self.file(path)) for path in paths], layouts, parts)
        return paths


@dataclass
class _Hashing:
    """A file whose sha256 is computed as it is written."""

    file: BinaryIO
    sha256: Any = field(default_factory=hashlib.sha256)
    size: int = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def check_replaceable(directory: Path | str, overwrite: bool = True) -> None:
    """Raises ArtifactError where `write` would: where anything but an artifact would be lost, or no folder can be."""
    directory = resolved(directory)

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
            raise ArtifactError(f"{directory} is not empty. Choose another folder, or empty it")
        try:
            foreign = sorted(present - files_in(directory) - {MANIFEST}) if present else ()
        except ArtifactError as error:
            raise ArtifactError(f"{directory} holds no artifact to replace. Choose another folder ({error})") from error
        if foreign:
            raise ArtifactError(f"{directory} holds {foreign[0]}, which is no part of its artifact. Move it elsewhere")

    with writing(directory):
        retry_if_replaced(directory, check)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Converts an OSError of the disk into an ArtifactError."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written ({error.strerror or error}), and is as it was. "
            "Make room there, or choose another folder"
        ) from error


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
