"""compressed-tensors, which llm-compressor and vLLM write: int8, packed integers and fp8, by groups of modules.

https://github.com/vllm-project/compressed-tensors: compressors/naive_quantized, compressors/pack_quantized,
quantization/lifecycle/forward_helpers.py (_dequantize).
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import regex
from pydantic import Field, field_validator, model_validator

from jx_neuron.checkpoint.quantized.codes import (
    E4M3,
    FLOATS,
    Codes,
    checked_groups,
    coded,
    described,
    part,
    read_small,
    unpacked,
    whole_groups,
    words,
)
from jx_neuron.checkpoint.quantized.options import Options, TwoSizes, refusal, warn_of_activations
from jx_neuron.checkpoint.tensor_files import Array, Tensor
from jx_neuron.errors import CheckpointError

METHOD = "compressed-tensors"
I8, I32, I64 = map(np.dtype, (np.int8, np.int32, np.int64))
CLASSES = ("Embedding", "Linear")
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
OF_CACHES = tuple(f".{of}_{what}" for of in "qkv" for what in ("scale", "zero_point"))

MOST_PATTERN = 1000  # characters
SECONDS = 1.0  # of all patterns on all modules, which take milliseconds unless they backtrack

Format = Literal["int-quantized", "naive-quantized", "float-quantized", "pack-quantized"]


class Weights(Options):
    """QuantizationArgs of weights."""

    INERT = "observer observer_kwargs scale_dtype zp_dtype"
    num_bits: Annotated[int, Field(ge=1, le=8)] = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: Literal["tensor", "channel", "group", "block"] | None = None
    block_structure: TwoSizes | None = None
    dynamic: Literal[False] = False
    actorder: Literal["weight", "static", "group", "dynamic", False] | None = None

    @field_validator("block_structure", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        text = isinstance(value, str) and re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)
        return list(map(int, text.groups())) if text else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.type == "float" and self.num_bits != 8:
            raise ValueError("num_bits=8 where type is 'float'")
        if self.kind == "group" and (self.group_size or 0) < 1:
            raise ValueError("a group_size of 1 or more where strategy is 'group'")
        if self.kind == "block" and self.block_structure is None:
            raise ValueError("a block_structure, such as [128, 128], where strategy is 'block'")
        return self

    @property
    def kind(self) -> str:
        """The strategy, which the group size implies where there is none."""
        return self.strategy or {None: "tensor", -1: "channel"}.get(self.group_size, "group")


class Group(Options):
    """QuantizationScheme: what a list of modules has."""

    targets: list[str]
    weights: Weights | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: Format | None = None


class Sparsity(Options):
    """SparsityCompressionConfig."""

    INERT = "global_sparsity ignore registry_requires_subclass sparsity_structure targets"
    format: Literal["dense"] = "dense"


class Config(Options):
    """QuantizationConfig."""

    INERT = "dequantize global_compression_ratio run_compressed use_optimized_inference version"
    config_groups: dict[str, Group]
    format: Literal[Format, "mixed-precision"]
    ignore: list[str] | None = None
    quantization_status: Literal["compressed", "frozen"] = "compressed"  # the first compressed checkpoints say frozen
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: Sparsity | None = None
    transform_config: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    moe_sparsity_config: None = None

    @property
    def integer_bits(self) -> int | None:
        weights = [group.weights for group in self.config_groups.values() if group.weights]
        return max((each.num_bits for each in weights if each.type == "int"), default=None)


@dataclass(frozen=True)
class Scheme:
    """How a module is stored."""

    weights: Weights
    format: str
    activations: bool


def widened(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, each with scales as the weight, float32."""
    schemes = _Schemes(config)
    wide = dict(tensors)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        scheme = schemes.of(module)
        wide[f"{module}.weight"] = _weight(tensors, module, scheme)
        for suffix in ("packed", "scale", "shape", "zero_point", "g_idx"):
            wide.pop(f"{module}.weight_{suffix}", None)
        for suffix in OF_ACTIVATIONS if scheme.activations else ():
            wide.pop(f"{module}.{suffix}", None)
    rounded = [group for group in config.config_groups.values() if group.input_activations or group.output_activations]
    if rounded:
        warn_of_activations("activations")
    if config.kv_cache_scheme is not None:
        warn_of_activations("the cache of keys and values")
        wide = {name: tensor for name, tensor in wide.items() if not name.endswith(OF_CACHES)}
    return wide


class _Schemes:
    """Which scheme a module has (compressed_tensors/utils/match.py): names come before patterns, and both before
    classes, which tensors do not have: every module with scales is taken to be of the class that is targeted."""

    def __init__(self, config: Config):
        self.config = config
        self.group = {target: group for group in config.config_groups.values() for target in group.targets}
        of_classes = [self.group[name] for name in CLASSES if name in self.group]
        if any(group.weights != of_classes[0].weights for group in of_classes):
            raise refusal("config_groups", "Linear and Embedding apart", "one scheme for both", METHOD)
        self.usual = of_classes[0] if of_classes else None
        self.ordered = sorted(self.group, key=lambda target: ("re:" in target, target))
        self.deadline = time.monotonic() + SECONDS

    def of(self, module: str) -> Scheme:
        if any(self._matches(module, target) for target in self.config.ignore or ()):
            raise CheckpointError(
                f"quantization_config: `ignore` has {module}, and the checkpoint has {module}.weight_scale. They are "
                "not of the same model: download both again"
            )
        names = [".".join(module.split(".")[i:]) for i in range(module.count(".") + 1)]  # prefixes vary
        target = next((t for name in names for t in self.ordered if self._matches(name, t)), None)
        group = self.usual if target is None else self.group[target]
        if group is None or group.weights is None:
            raise CheckpointError(
                f"quantization_config: no target of config_groups with weights is {module}, and the checkpoint has "
                f"{module}.weight_scale. They are not of the same model: download both again"
            )
        kind = group.format or self.config.format
        if kind == "mixed-precision":
            raise refusal("format", kind, "a format in each of config_groups besides it", METHOD)
        return Scheme(group.weights, kind, bool(group.input_activations or group.output_activations))

    def _matches(self, module: str, target: str) -> bool:
        if not target.startswith("re:"):
            return module == target
        pattern, timeout = target.removeprefix("re:"), max(0.1, self.deadline - time.monotonic())
        try:
            if len(pattern) > MOST_PATTERN:
                raise OverflowError(f"it has {len(pattern):,} characters, and {MOST_PATTERN:,} are legal")
            return regex.match(pattern, module, timeout=timeout) is not None
        except (regex.error, RecursionError, OverflowError, TimeoutError) as error:
            legal = f"a regular expression after re: that takes no time ({str(error) or 'it takes too long'})"
            raise refusal("targets or ignore", target, legal, METHOD) from error


def _weight(tensors: Mapping[str, Tensor], module: str, scheme: Scheme) -> Tensor:
    weights, packed = scheme.weights, scheme.format == "pack-quantized"
    shape = _packed_shape(tensors, module) if packed else _plain_shape(tensors, module)
    rows, columns = shape
    block = {
        "tensor": [rows, columns],
        "channel": [1, columns],
        "group": [1, weights.group_size or 1],
        "block": weights.block_structure or [1, 1],
    }[weights.kind]
    if weights.kind == "group":
        whole_groups(module, columns, block[1])
    blocks = (-(-rows // max(1, block[0])), -(-columns // max(1, block[1])))
    why = f"{module} has {weights.num_bits} bits of {list(shape)}, {scheme.format}, and a scale a {weights.kind}"
    scale = tensors[f"{module}.weight_scale"]
    scalar = weights.kind == "tensor" and scale.shape in ((), (1,))
    scales = part(tensors, f"{module}.weight_scale", FLOATS, scale.shape if scalar else blocks, why)
    zeros = _zeros(tensors, module, scheme, scales.shape, why)
    order = _order(tensors, module, weights, columns, why)
    if packed:
        dtype, stored_shape, name = I32, (rows, words(columns, weights.num_bits)), f"{module}.weight_packed"
    else:
        dtype, stored_shape, name = I8 if weights.type == "int" else E4M3, shape, f"{module}.weight"
    codes = part(tensors, name, [dtype], stored_shape, why)

    def stored() -> Codes:
        read = codes.load()
        offsets = None if zeros is None else zeros.load()
        if packed:
            read = _signed(read, weights.num_bits, columns)
            if offsets is not None and offsets.dtype == I32:
                offsets = _signed(offsets.T, weights.num_bits, rows).T
        return Codes(
            codes=read,
            scales=scales.load().reshape(blocks),
            block=(block[0], block[1]),
            zeros=None if offsets is None else offsets.reshape(blocks),
            group_c=None if order is None else checked_groups(f"{module}.weight_g_idx", order.load(), blocks[1]),
            lowest=-(1 << (weights.num_bits - 1)),
        )

    return coded(shape, stored, blocks[1] > 1)


def _signed(packed: Array, bits: int, count: int) -> Array:
    """int8 of packed numbers, to which half their range was added."""
    return (unpacked(packed, bits, count) - np.uint8(1 << (bits - 1))).view(np.int8)


def _plain_shape(tensors: Mapping[str, Tensor], module: str) -> tuple[int, int]:
    codes = tensors.get(f"{module}.weight")
    if codes is None or len(codes.shape) != 2:
        raise CheckpointError(
            f"{module}.weight is {'missing' if codes is None else described(codes)}, and there is "
            f"{module}.weight_scale; legal is a matrix. config.json and weights are not of the same model, or damaged"
        )
    return codes.shape[0], codes.shape[1]


def _packed_shape(tensors: Mapping[str, Tensor], module: str) -> tuple[int, int]:
    """The contents of weight_shape, which is read at once: nothing else has the number of columns."""
    name = f"{module}.weight_shape"
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != (2,) or tensor.dtype not in (I32, I64):
        raise CheckpointError(
            f"{name} is {'missing' if tensor is None else described(tensor)}, which format 'pack-quantized' needs as "
            "int64[2]; download the checkpoint again"
        )
    rows, columns = map(int, read_small(name, tensor, 16))
    if not (0 < rows < 2**31 and 0 < columns < 2**31):
        raise CheckpointError(f"{name} is {[rows, columns]}; legal are rows and columns; download it again")
    return rows, columns


def _zeros(
    tensors: Mapping[str, Tensor], module: str, scheme: Scheme, of_scales: tuple[int, ...], why: str
) -> Tensor | None:
    """The zero points: packed along the rows where the weight is packed and they are not 0, else as the scales."""
    name, weights = f"{module}.weight_zero_point", scheme.weights
    if not weights.symmetric and scheme.format == "pack-quantized" and weights.kind in ("group", "channel"):
        return part(tensors, name, [I32], (words(of_scales[0], weights.num_bits), of_scales[1]), why)
    if weights.symmetric and name not in tensors:
        return None
    return part(tensors, name, [E4M3, *FLOATS] if weights.type == "float" else [I8], of_scales, why)


def _order(tensors: Mapping[str, Tensor], module: str, weights: Weights, columns: int, why: str) -> Tensor | None:
    """The group of each column, where these are ordered by activation."""
    name = f"{module}.weight_g_idx"
    if name not in tensors and weights.actorder not in ("group", "dynamic"):
        return None
    if weights.kind != "group":
        raise refusal("actorder", weights.actorder, "null where strategy is not 'group'", METHOD)
    return part(tensors, name, [I32], (columns,), why)
