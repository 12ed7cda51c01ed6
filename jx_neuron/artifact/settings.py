"""The settings that a model is lowered for: the part of a manifest that says which programs there are, and why."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from jx_neuron.config import QuantizationConfig, dtype_of
from jx_neuron.lowering.signature import MOST_ENTRIES, RECORD, Count, Degree, Several
from jx_neuron.lowering.verify.rules import target_of
from jx_neuron.nn.adapters import Adapters
from jx_neuron.nn.encoded import StateDtype
from jx_neuron.step.buckets import MOST_BUCKETS, Buckets
from jx_neuron.step.program_key import ProgramKey

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
    """The settings that a model is lowered for.

    batch_sizes:  rows of its programs, ascending.
    generation:   the ids of its end and padding tokens.
    target:       the instance family that the programs were checked and compiled for; None before that.
    prompt_batch: rows of the programs that take prompts, where decode programs have more.
    rotations:    where RoPE depends on the length of the prompt: the fields of `Rotations`.
    window:       how many of a sequence's last positions every layer keeps; None for all.
    state:        of each array of the state table the shape of one slot on one core, by name.
    state_dtypes: the dtypes of those arrays that have one of their own, whatever `amp` is.
    quant:        how weights are quantized; None where they are not.
    speculation:  tokens of the programs that verify drafts, ascending; none where there are no such programs.
    adapters:     the ones from which each row of a program names one; None where there are none.

    Raises ValueError for settings that contradict each other.
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
    window: Annotated[int, Field(ge=0, le=MOST)] | None = None
    state: Annotated[Mapping[str, Several[Count]], Field(max_length=MOST_ENTRIES)] = field(default_factory=dict)
    state_dtypes: Annotated[Mapping[str, StateDtype], Field(max_length=MOST_ENTRIES)] = field(default_factory=dict)
    quant: QuantizationConfig | None = None
    speculation: Annotated[tuple[Positive, ...], Field(max_length=MOST_BUCKETS)] = ()
    adapters: Adapters | None = None

    __pydantic_config__ = RECORD

    def __post_init__(self) -> None:
        if self.candidates > self.vocab_size:
            raise ValueError(f"{self.candidates} candidates of {self.vocab_size} tokens")
        if self.speculation:
            _ascending(self.speculation)
        if self.prompt_batch and (len(self.batch_sizes) > 1 or self.batch_sizes[0] % self.prompt_batch):
            raise ValueError(f"prompts of {self.prompt_batch} rows do not divide batches {self.batch_sizes}")

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.amp)

    @property
    def cache_dtype(self) -> str:
        """The dtype that keys and values are stored in."""
        return next((dtype for dtype in self.state_dtypes.values() if dtype != "float32"), self.dtype.name)

    @property
    def slots(self) -> int:
        """Sequences that the state table has room for."""
        return self.batch_sizes[-1]

    @property
    def most_prompts(self) -> int:
        """The most prompts of a call."""
        return self.prompt_batch or self.slots

    @property
    def token_ids(self) -> dict[str, Any] | None:
        """The end and padding tokens that are known; None where neither is."""
        return {name: ids for name, ids in self.generation.items() if ids is not None} or None

    @property
    def programs(self) -> list[ProgramKey]:
        """Every program that such a model can call for."""
        keys = [key for rows in self.batch_sizes for key in self.buckets.programs(rows, self.candidates)]
        if self.prompt_batch:
            decoding = [key for key in keys if key.kind == "decode"]
            keys = [*self.buckets.programs(self.prompt_batch, self.candidates), *decoding]
            keys = [key for key in keys if key.kind != "decode" or key.rows in self.batch_sizes]
        if self.all_logits:
            keys += [dataclasses.replace(key, kind="score") for key in keys if key.kind == "prefill"]
        sizes = [(rows, t, s) for rows in self.batch_sizes for t in self.speculation for s in self.buckets.tokens]
        keys += [ProgramKey("verify", rows, t, s, self.candidates) for rows, t, s in sizes if t < s]
        return list(dict.fromkeys(keys))

    def differences(self, asked: "Settings") -> list[str]:
        """The differences from the settings `asked`, a text for each field; token ids and target do not count."""
        same_cache = self.cache_dtype == asked.cache_dtype
        others = ["generation", "target", *([] if same_cache else ["state", "state_dtypes"])]  # which follow from it
        names = [field.name for field in dataclasses.fields(self) if field.name not in others]
        names += [] if same_cache else ["cache_dtype"]
        pairs = {name: (getattr(self, name), getattr(asked, name)) for name in names}
        return [f"{name}={own!r} and not {other!r}" for name, (own, other) in pairs.items() if own != other]
