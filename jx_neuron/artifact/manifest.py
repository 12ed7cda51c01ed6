"""The manifest of an artifact: what it may say, and how it is kept from being altered."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import ml_dtypes  # noqa: F401 (gives numpy the name bfloat16)
import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from jx_neuron.errors import ArtifactError
from jx_neuron.util.pages import uncollected
from jx_neuron.util.parsing import boundary, parse_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNSEALED = "0" * 64
MOST_BYTES = 24 * 2**20  # a program of Llama 3.1 405B takes 0.6 MB
MOST_ENTRIES = 100_000  # of anything that there are several of


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


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    json.dumps(content, allow_nan=False)
    return content


def _few(content: Any) -> Any:
    """Refuses at once what pydantic would collect a complaint about each entry of."""
    if isinstance(content, dict) and len(content) > MOST_ENTRIES:
        raise ValueError(f"it has {len(content):,} entries, and may have {MOST_ENTRIES:,}")
    return content


T = TypeVar("T")
Several = Annotated[tuple[T, ...], Strict(False), FailFast(), Field(max_length=MOST_ENTRIES)]  # a list in JSON
Count = Annotated[int, Field(ge=0, lt=2**48)]
Named = Annotated[dict[str, T], BeforeValidator(_few)]
JsonObject = Annotated[Named[Any], AfterValidator(_finite)]
RelativePath = Annotated[str, Field(max_length=4096), AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ProgramName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
Degree = Annotated[int, Field(ge=1, le=4096)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, from_attributes=True)
    _check_size = model_validator(mode="before")(_few)


class FileRecord(_Record):
    """Size in bytes and sha256 of a file."""

    size: Count
    sha256: Sha256


class TensorRecord(_Record):
    """One input or output of a program, as one core sees it; the fields are TensorSpec's."""

    kind: Literal["param", "cache", "input", "rank", "output"]
    name: str
    shape: Several[Count]
    dtype: Annotated[str, AfterValidator(_dtype)]
    partition: Several[Literal["tp"] | None]
    alias: Count | None

    @property
    def nbytes(self) -> int:
        """Bytes of it on one core."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

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
    inputs: Several[TensorRecord]
    outputs: Several[TensorRecord]

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
    format_version: Annotated[int, Field(ge=1)]
    model_type: str
    tp_degree: Degree
    config: JsonObject
    neuron: JsonObject
    programs: Annotated[Several[ProgramRecord], Field(min_length=1)]
    weights: Several[RelativePath]
    tools: Named[str]
    files: Annotated[dict[RelativePath, FileRecord], BeforeValidator(_few)]

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
        needed = sum(tensor.nbytes for tensor in self.parameters.values())
        for name in self.weights:
            if (size := self.files[name].size) < needed:
                raise ValueError(f"{name} has {size:,} bytes, and the programs' parameters {needed:,}")
        return self

    @property
    def parameters(self) -> dict[str, TensorRecord]:
        """The programs' parameters by name."""
        return parameters_of(self.programs)


def parameters_of(programs: Iterable[ProgramRecord]) -> dict[str, TensorRecord]:
    """The parameters of all `programs` by name. Raises ArtifactError where two differ in one."""
    parameters: dict[str, TensorRecord] = {}
    for program in programs:
        for tensor in program.inputs:
            if tensor.kind == "param" and parameters.setdefault(tensor.name, tensor) != tensor:
                raise ArtifactError(f"{program.name} takes another {tensor.name} than the programs before it")
    return parameters


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`. Raises ArtifactError, with the reason, unless it is as it was written."""
    path = directory / MANIFEST

    def refuse(reason: str, way_out: str = "Save it again, or fetch a whole copy") -> NoReturn:
        raise ArtifactError(f"artifact {directory}: {reason}. {way_out}")

    if not path.is_file():
        refuse(f"there is no {MANIFEST}", "Give the folder that was saved to")
    with boundary(path, ArtifactError), uncollected():
        if (size := path.stat().st_size) > MOST_BYTES:
            refuse(f"{MANIFEST} has {size:,} bytes; it may have {MOST_BYTES:,}")
        raw = path.read_bytes()
        content = parse_json(raw, str(path), ArtifactError)
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            refuse(
                f"its format version {version} is newer than the {FORMAT_VERSION} known here",
                "Upgrade jx_neuron: `git pull` in its clone, then `pip install .` there",
            )
        if not _is_sealed(raw):
            refuse(f"{MANIFEST} was altered: its sha256 is not its own")
        try:
            return Manifest.model_validate(content)
        except ValidationError as error:
            refuse(f"{MANIFEST} is not sound: {reason_of(error)}")


def sealed(manifest: Manifest) -> bytes:
    """The manifest as bytes, with the sha256 of those bytes (taken with zeros in its place) in front."""
    content = manifest.model_copy(update={"sha256": UNSEALED}).model_dump(mode="json")
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.replace(UNSEALED, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


def _is_sealed(raw: bytes) -> bool:
    head = re.match(rb'\{\n "sha256": "([0-9a-f]{64})"', raw)
    if head is None:
        return False
    start, end = head.span(1)
    return hashlib.sha256(raw[:start] + UNSEALED.encode() + raw[end:]).hexdigest().encode() == head[1]


def _unique(what: str, names: Sequence[object]) -> None:
    name, times = max(Counter(names).items(), key=itemgetter(1), default=("", 0))
    if times > 1:
        raise ValueError(f"{name!r} is there twice among the {what}")


def reason_of(error: ValidationError) -> str:
    """The first complaint of pydantic in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
