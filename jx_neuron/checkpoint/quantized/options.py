"""The quantization_config of a config.json, field by field."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jx_neuron.errors import CheckpointError
from jx_neuron.util.arguments import shown

FIELD = "quantization_config"
INSTEAD = "Use the model's unquantized checkpoint"

Fields = TypeVar("Fields", bound="Options")


def _group_size(size: int) -> int:
    if size != -1 and size < 1:
        raise ValueError("-1, for all inputs, or how many inputs share a scale")
    return size


def _two(numbers: list[int]) -> list[int]:
    if len(numbers) != 2:
        raise ValueError("two numbers, such as [128, 128]")
    return numbers


GroupSize = Annotated[int, AfterValidator(_group_size)]
Size = Annotated[int, Field(gt=0, lt=2**31)]
TwoSizes = Annotated[list[Size], AfterValidator(_two)]


class Options(BaseModel):
    """Base of a format's fields. `INERT` names fields that change no weight."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    INERT: ClassVar[str] = ""
    quant_method: str | None = None

    @property
    def integer_bits(self) -> int | None:
        """Bits of a weight, the most where they differ; None where codes are no integers."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _without_inert(cls, fields: Any) -> Any:
        inert = cls.INERT.split()
        return {k: v for k, v in fields.items() if k not in inert} if isinstance(fields, Mapping) else fields


def parsed(options: type[Fields], fields: Mapping[str, Any], method: str, name: str = FIELD) -> Fields:
    """The fields of `name`. Raises CheckpointError that names a field that is not legal, and says what is."""
    try:
        return options.model_validate(fields)
    except ValidationError as raised:
        first = raised.errors()[0]
        field, kind = ".".join(map(str, first["loc"])), first["type"]
        if kind == "missing":
            raise CheckpointError(f"{name} lacks {field}, which {method!r} needs. {INSTEAD}") from raised
        if kind == "extra_forbidden":
            raise CheckpointError(
                f"{name}: {field}={shown(first['input'])} is not known with quant_method {method!r}. If it changes no "
                "weight, remove it from config.json; else use the model's unquantized checkpoint"
            ) from raised
        legal = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise refusal(field, first["input"], legal, method, name) from raised


def refusal(field: str, value: object, legal: str, method: str, name: str = FIELD) -> CheckpointError:
    return CheckpointError(
        f"{name}: {field}={shown(value)} is not supported with quant_method {method!r}; legal is {legal}. {INSTEAD}"
    )


def warn_of_activations(what: str) -> None:
    """Warns that only the weights are read as quantized."""
    warnings.warn(
        f"{FIELD} quantizes {what} too. Only weights are read as quantized here, so logits differ from "
        "those of a run that rounds both",
        stacklevel=2,
    )
