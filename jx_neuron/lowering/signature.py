"""The inputs and outputs of a program, as lowering, manifests and runtimes share them."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import ml_dtypes  # noqa: F401 (gives numpy the name bfloat16)
import numpy as np
from pydantic import AfterValidator, ConfigDict, FailFast, Field

Kind = Literal["param", "state", "input", "rank", "output"]

MOST_ENTRIES = 100_000  # of any list in a manifest

T = TypeVar("T")
Several = Annotated[tuple[T, ...], FailFast(), Field(max_length=MOST_ENTRIES)]
Count = Annotated[int, Field(ge=0, lt=2**48)]
Degree = Annotated[int, Field(ge=1, le=4096)]
ProgramName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
RECORD = ConfigDict(extra="forbid", strict=True, revalidate_instances="always")


def _dtype(name: str) -> str:
    try:
        canonical = np.dtype(name).name
    except TypeError:
        canonical = ""
    if canonical != name:
        raise ValueError(f"{name!r} is no numpy or ml_dtypes type")
    return name


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program.

    Attributes:
        kind: "param", "state" (its memory is an output's too), "input", "rank" or "output".
        shape: on one core.
        dtype: as numpy or ml_dtypes name it.
        partition: for each axis the name of the mesh's axis, such as "tp", over which it is split, else None.
        alias: of an output, the number of the input whose memory it takes.
    """

    name: str
    kind: Kind
    shape: Several[Count]
    dtype: Annotated[str, AfterValidator(_dtype)]
    partition: Several[str | None]
    alias: Count | None = None

    __pydantic_config__ = RECORD

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on one core."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def split_axis(self) -> int | None:
        """The index of the axis that is split over the cores; None where every core has the whole tensor."""
        return next((axis for axis, name in enumerate(self.partition) if name), None)

    def global_shape(self, tp_degree: int) -> tuple[int, ...]:
        """The shape over all cores."""
        return tuple(n * tp_degree if axis else n for n, axis in zip(self.shape, self.partition, strict=True))


@dataclass(frozen=True)
class ProgramSpec:
    """A program without its code.

    Attributes:
        mesh: the names and sizes of the axes of the cores that run the program: {"tp": 8}.
        inputs: the program's parameters in order. An input of kind "rank", int32[1], comes last where the program
            depends on the core that it runs on; rank r receives r.
        outputs: the elements of the result in order; a single output is no tuple.
    """

    name: ProgramName
    mesh: Annotated[dict[str, Degree], Field(min_length=1)] = field(hash=False)
    inputs: Several[TensorSpec]
    outputs: Several[TensorSpec]

    __pydantic_config__ = RECORD

    @property
    def tp_degree(self) -> int:
        """The number of cores that run the program."""
        return math.prod(self.mesh.values())
