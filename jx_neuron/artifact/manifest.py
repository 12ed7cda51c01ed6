"""The manifest of an artifact: its schema, and the hash that seals it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jx_neuron.artifact.settings import Settings
from jx_neuron.errors import ArtifactError
from jx_neuron.lowering.signature import MOST_ENTRIES, RECORD, Count, Degree, ProgramSpec, Several, TensorSpec
from jx_neuron.util.pages import gc_paused
from jx_neuron.util.parsing import boundary, parse_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UNSEALED = "0" * 64
MOST_BYTES = 24 * 2**20  # a program of Llama 3.1 405B takes 0.6 MB


def is_inside(path: str) -> bool:
    """Whether `path` is relative, has forward slashes, and stays inside the folder."""
    parts = path.split("/")
    return not ({"", ".", ".."} & set(parts) or "\\" in path or "\0" in path or ":" in path)


def _inside(path: str) -> str:
    if not is_inside(path):
        raise ValueError(f"{path!r} is not a path inside the artifact")
    return path


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    json.dumps(content, allow_nan=False)
    return content


def _consistent(program: ProgramSpec) -> ProgramSpec:
    """Raises ValueError for a program whose inputs and outputs do not fit its mesh, or each other."""
    _unique(f"inputs of {program.name}", [tensor.name for tensor in program.inputs])
    _unique(f"outputs of {program.name}", [tensor.name for tensor in program.outputs])
    _unique(f"aliases of {program.name}", [tensor.alias for tensor in program.outputs if tensor.alias is not None])
    for tensor in (*program.inputs, *program.outputs):
        axes = [axis for axis in tensor.partition if axis is not None]
        if len(tensor.partition) != len(tensor.shape):
            raise ValueError(f"{tensor.name} has {len(tensor.shape)} axes, not {len(tensor.partition)}")
        if not set(axes) <= set(program.mesh) or len(set(axes)) < len(axes):
            raise ValueError(
                f"the partition {list(tensor.partition)} of {tensor.name} does not name axes of the mesh "
                f"{program.mesh}, each once"
            )
    for tensor in program.outputs:
        if tensor.alias is None:
            continue
        source = program.inputs[tensor.alias] if tensor.alias < len(program.inputs) else None
        if source is None or (source.shape, source.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"output {tensor.name} of {program.name} cannot be an alias of input {tensor.alias}")
    return program


JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
RelativePath = Annotated[str, Field(max_length=4096), AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(BaseModel):
    """Size in bytes and sha256 of a file."""

    model_config = ConfigDict(**RECORD, frozen=True)

    size: Count
    sha256: Sha256


class Manifest(BaseModel):
    """The content of manifest.json.

    settings: the settings that the model was lowered for.
    programs: the HLO of a program is the file `hlo_file(name)`, its NEFF `neff_file(name)` where that is listed.
    weights:  one file a rank, or none.
    files:    path → record of every file but the manifest.
    ranks_per_host: the ranks that each host runs, host after host; None where any number may that divides the degree.
    """

    model_config = ConfigDict(**RECORD, frozen=True)

    sha256: Sha256
    format_version: Annotated[int, Field(ge=1)]
    config: JsonObject
    settings: Settings
    programs: Annotated[Several[Annotated[ProgramSpec, AfterValidator(_consistent)]], Field(min_length=1)]
    weights: Several[RelativePath]
    tools: dict[str, str]
    files: dict[RelativePath, FileRecord]
    ranks_per_host: Degree | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _unique("programs", [program.name for program in self.programs])
        settings, degree = self.settings, self.programs[0].tp_degree
        if any(program.mesh != self.mesh for program in self.programs):
            raise ValueError("its programs are for different meshes")
        if (settings.model_type, settings.tp_degree) != (self.config.get("model_type", settings.model_type), degree):
            raise ValueError(
                f"its settings are for {settings.model_type} on {settings.tp_degree} cores, its config is of "
                f"{self.config.get('model_type')} and its programs are for the mesh {self.mesh}"
            )
        if self.ranks_per_host is not None and degree % self.ranks_per_host:
            raise ValueError(f"hosts of {self.ranks_per_host} ranks cannot share {degree}; choose a divisor")
        if self.weights and len(self.weights) != degree:
            raise ValueError(f"weights of {len(self.weights)} ranks are listed, and there are {degree}")
        named = [*(hlo_file(program.name) for program in self.programs), *self.weights]
        _unique("files", named)
        if unlisted := sorted(set(named) - set(self.files)):
            raise ValueError(f"{unlisted[0]} is named but not listed with its hash")
        if MANIFEST in self.files:
            raise ValueError(f"{MANIFEST} cannot list itself")
        required = sum(tensor.nbytes for tensor in self.parameters.values())
        for name in self.weights:
            if (size := self.files[name].size) < required:
                raise ValueError(f"{name} has {size:,} bytes, and the programs' parameters {required:,}")
        return self

    @property
    def mesh(self) -> dict[str, int]:
        """The names and sizes of the axes of the cores that run each program: {"tp": 8}."""
        return self.programs[0].mesh

    @property
    def parameters(self) -> dict[str, TensorSpec]:
        """The programs' parameters by name."""
        return parameters_of(self.programs)


def hlo_file(program: str) -> str:
    """The path of a program's HLO."""
    return f"hlo/{program}.pb"


def neff_file(program: str) -> str:
    """The path of a program's NEFF."""
    return f"neff/{program}.neff"


def parameters_of(programs: Iterable[ProgramSpec]) -> dict[str, TensorSpec]:
    """The parameters of all `programs` by name. Raises ArtifactError where two differ in one."""
    parameters: dict[str, TensorSpec] = {}
    for program in programs:
        for tensor in program.inputs:
            if tensor.kind == "param" and parameters.setdefault(tensor.name, tensor) != tensor:
                raise ArtifactError(f"{program.name} takes another {tensor.name} than the programs before it")
    return parameters


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`. Raises ArtifactError, with the reason, unless it is valid and unaltered."""
    raw, content = _read(directory)
    version = content.get("format_version")
    if isinstance(version, int) and version < FORMAT_VERSION:
        _refuse(
            directory,
            f"it was saved by an older jx_neuron (format version {version}; this one reads {FORMAT_VERSION})",
            "Save it again with this one, from its checkpoint: `jx-neuron compile`, or model.save()",
        )
    if _most_entries(content) > MOST_ENTRIES:
        _refuse(directory, f"{MANIFEST} is not sound: one part has more than {MOST_ENTRIES:,} entries")
    del content
    with boundary(directory / MANIFEST, ArtifactError), gc_paused():
        try:
            return Manifest.model_validate_json(raw, strict=True)
        except ValidationError as error:
            _refuse(directory, f"{MANIFEST} is not sound: {reason_of(error)}")


def files_in(directory: Path) -> set[str]:
    """The files that the manifest in `directory` lists, of this format version or an older one.

    Raises ArtifactError as `read_manifest` does.
    """
    _, content = _read(directory)
    files = content.get("files")
    if not isinstance(files, dict):
        _refuse(directory, f"{MANIFEST} lists no files")
    return set(files)


def _read(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """A manifest's bytes and content, unaltered and not newer than this code."""
    path = directory / MANIFEST
    if not path.is_file():
        _refuse(directory, f"there is no {MANIFEST}", "Give the folder that was saved to")
    with boundary(path, ArtifactError), gc_paused():
        if (size := path.stat().st_size) > MOST_BYTES:
            _refuse(directory, f"{MANIFEST} has {size:,} bytes; it may have {MOST_BYTES:,}")
        raw = path.read_bytes()
        content = parse_json(raw, str(path), ArtifactError)
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        _refuse(
            directory,
            f"its format version {version} is newer than the {FORMAT_VERSION} known here",
            "Upgrade jx_neuron: `git pull` in its clone, then `pip install .` there",
        )
    if not _is_sealed(raw):
        _refuse(directory, f"{MANIFEST} was altered: its sha256 is not its own")
    return raw, content


def _refuse(directory: Path, reason: str, way_out: str = "Save it again, or fetch a whole copy") -> NoReturn:
    raise ArtifactError(f"artifact {directory}: {reason}. {way_out}")


def _most_entries(content: Any) -> int:
    """The number of entries of the largest part of `content`; a part with more than is legal is not searched."""
    most, rest = 0, [content]
    while rest and most <= MOST_ENTRIES:
        part = rest.pop()
        most = max(most, len(part))
        if most <= MOST_ENTRIES:
            values = part.values() if isinstance(part, dict) else part
            rest += [value for value in values if isinstance(value, (dict, list))]
    return most


def sealed(manifest: Manifest) -> bytes:
    """The manifest as bytes. It starts with their sha256, which is computed with zeros in its place."""
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
    """The first error of a pydantic validation, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
