"""The manifest of an artifact: what it may say, and how it is kept from being altered."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import ml_dtypes  # noqa: F401 (gives numpy the name bfloat16)
import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from jx_neuron.errors import ArtifactError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNSEALED = "0" * 64


def is_inside(path: str) -> bool:
    """Whether `path` is relative, with forward slashes, and stays inside."""
    parts = path.split("/")
    return not ({"", ".", ".."} & set(parts) or "\\" in path or "\0" in path or ":" in path)


def _inside(path: str) -> str:
    if not is_inside(path):
        raise ValueError(f"{path!r} is not a path inside the artifact")
    return path


def _dtype(name: str) -> str:
    try:
        known = np.dtype(name).name
    except TypeError:
        known = ""
    if known != name:
        raise ValueError(f"{name!r} is no numpy or ml_dtypes type")
    return name


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ProgramName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, from_attributes=True)


class FileRecord(_Record):
    """Size in bytes and sha256 of a file."""

    size: NonNegativeInt
    sha256: Sha256


class TensorRecord(_Record):
    """One input or output of a program, as one core sees it; the fields are TensorSpec's."""

    kind: Literal["param", "cache", "input", "rank", "output"]
    name: str
    shape: tuple[NonNegativeInt, ...]
    dtype: Annotated[str, AfterValidator(_dtype)]
    partition: tuple[Literal["tp"] | None, ...]
    alias: NonNegativeInt | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.partition) != len(self.shape):
            raise ValueError(f"{self.name} has {len(self.shape)} axes, not {len(self.partition)}")
        return self


class ProgramRecord(_Record):
    """One program: its files, and its inputs and outputs in order."""

    name: ProgramName
    hlo: RelativePath
    neff: RelativePath | None
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique(f"inputs of {self.name}", [tensor.name for tensor in self.inputs])
        _unique(f"outputs of {self.name}", [tensor.name for tensor in self.outputs])
        aliases = [tensor.alias for tensor in self.outputs if tensor.alias is not None]
        _unique(f"aliases of {self.name}", aliases)
        for tensor in self.outputs:
            if tensor.alias is None:
                continue
            source = self.inputs[tensor.alias] if tensor.alias < len(self.inputs) else None
            if source is None or (source.shape, source.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"output {tensor.name} of {self.name} cannot be an alias of input {tensor.alias}")
        return self


class Manifest(_Record):
    """What manifest.json says. `weights` names one file a rank, or none; `neuron` is the NeuronConfig."""

    sha256: Sha256
    format_version: PositiveInt
    model_type: str
    tp_degree: PositiveInt
    config: dict[str, JsonValue]
    neuron: dict[str, JsonValue]
    programs: tuple[ProgramRecord, ...] = Field(min_length=1)
    weights: tuple[RelativePath, ...]
    tools: dict[str, str]
    files: dict[RelativePath, FileRecord]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("programs", [program.name for program in self.programs])
        if self.weights and len(self.weights) != self.tp_degree:
            raise ValueError(f"weights of {len(self.weights)} ranks are listed, and there are {self.tp_degree}")
        named = [file for program in self.programs for file in (program.hlo, program.neff) if file]
        named += self.weights
        _unique("files", named)
        if unlisted := sorted(set(named) - set(self.files)):
            raise ValueError(f"{unlisted[0]} is named but not listed with its hash")
        if MANIFEST in self.files:
            raise ValueError(f"{MANIFEST} cannot list itself")
        return self


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`. Raises ArtifactError, with the reason, unless it is as it was written."""
    path = directory / MANIFEST

    def refuse(reason: str, way_out: str = "Save it again, or fetch a whole copy") -> NoReturn:
        raise ArtifactError(f"artifact {directory}: {reason}. {way_out}")

    if not path.is_file():
        refuse(f"there is no {MANIFEST}", "Give the folder that was saved to")
    raw = path.read_bytes()
    try:
        told = json.loads(raw, parse_constant=_not_json, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        refuse(f"{MANIFEST} is no JSON, or cut short ({error})")
    if not isinstance(told, dict):
        refuse(f"{MANIFEST} is no JSON object")
    known = told.get("format_version")
    if isinstance(known, int) and known > FORMAT_VERSION:
        refuse(
            f"its format version {known} is newer than the {FORMAT_VERSION} known here",
            "Upgrade jx_neuron: `git pull` in its clone, then `pip install .` there",
        )
    try:
        manifest = Manifest.model_validate_json(raw)
        whole = sealed(manifest) == raw
    except ValidationError as error:
        refuse(f"{MANIFEST} is not sound: {reason_of(error)}")
    except ValueError as error:
        refuse(f"{MANIFEST} holds a number that is not JSON ({error})")
    if not whole:
        refuse(f"{MANIFEST} was altered: its sha256 is not its own")
    return manifest


def sealed(manifest: Manifest) -> bytes:
    """The manifest as bytes, with the sha256 of those bytes (taken with zeros in its place) in front."""
    told = manifest.model_copy(update={"sha256": UNSEALED}).model_dump(mode="json")
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.replace(UNSEALED, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


def _unique(what: str, names: Sequence[object]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice among the {what}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _unique("keys of an object", [key for key, _ in pairs])
    return dict(pairs)


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def reason_of(error: ValidationError) -> str:
    """The first complaint of pydantic in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
