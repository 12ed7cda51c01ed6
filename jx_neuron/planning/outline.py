"""A model's sizes at any tensor-parallel degree, from its config alone: no weight is read and no device used."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.row import W
from jx_neuron.config import QuantizationConfig
from jx_neuron.models import Decoder, family, model_types, text_config
from jx_neuron.nn import blocks
from jx_neuron.nn.encoded import StateDtype
from jx_neuron.nn.quantized import Form
from jx_neuron.nn.sharding import AXIS, Padding
from jx_neuron.planning import collectives


@dataclass(frozen=True)
class Parameter:
    """A parameter: its row, its padded `shape` over all cores, over how many cores it is split, in how many layers it
    is, and where it is quantized, how."""

    row: W | None
    shape: tuple[int, ...]
    cores: int
    count: int
    form: Form | None = None

    @property
    def elements(self) -> int:
        """Elements over all cores and layers; replicated ones count once."""
        return math.prod(self.shape) * self.count

    @property
    def per_core(self) -> int:
        """Elements of all layers that each core holds."""
        return self.elements // self.cores

    def stored(self, itemsize: int) -> int:
        """Bytes of all layers that each core holds, `itemsize` a number that has no dtype of its own."""
        if self.form is None:
            return self.per_core * (np.dtype(np.float32).itemsize if self.is_float32 else itemsize)
        spec = PartitionSpec() if self.row is None else self.row.partition
        parts = self.form.shapes(self.shape, np.dtype(f"u{itemsize}"))
        return self.count * sum(
            math.prod(array.shape)
            * array.dtype.itemsize
            // (self.cores if AXIS in self.form.partition(name, spec) else 1)
            for name, array in parts.items()
        )

    @property
    def is_computed(self) -> bool:
        return self.row is not None and self.row.is_computed

    @property
    def is_float32(self) -> bool:
        return self.row is not None and self.row.is_float32

    @property
    def is_looked_up(self) -> bool:
        """Whether it is a table, by position or token, that is never a head."""
        return self.row is not None and bool({"s", "u"} & {*self.row.letters})

    @property
    def is_of_experts(self) -> bool:
        """Whether each expert has a part."""
        return self.row is not None and len(self.row.letters) > 1 and self.row.letters[0] == "e"

    @property
    def is_vocabulary_table(self) -> bool:
        return self.row is not None and len(self.row.letters) > 1 and self.row.letters[0] == "v"


@dataclass(frozen=True, eq=False)
class Outline:
    """The sizes of a model.

    decoder: the model, or the same with fewer layers.
    layers:  the model's number of layers.
    """

    decoder: Decoder
    layers: int

    @classmethod
    def of(cls, model: "Mapping[str, Any] | Decoder | Outline", quant: QuantizationConfig | None = None) -> "Outline":
        """The outline of a parsed config.json, quantized as `quant` has it, or of a decoder. Raises ConfigError where
        the config is not supported."""
        if isinstance(model, Outline):
            return model
        if isinstance(model, Decoder):
            return cls(dataclasses.replace(model, tp_degree=1), model.config.layers)
        model = text_config(model)
        model_type = model.get("model_type")
        config = family(model_type).Config.from_hf(model) if model_type in model_types() else None
        differ = quant is not None and (quant.keep or quant.no_quantize_list)
        if config is None or not config.layers_alike or differ:
            return cls.of(dataclasses.replace(Decoder.from_config(model), quant=quant))
        one_layer = {"model_type": config.MODEL_TYPE, **config.with_layers(1).to_hf()}
        return cls(Decoder.from_config(one_layer), config.layers).quantized(quant)

    def quantized(self, quant: QuantizationConfig | None) -> "Outline":
        """The outline with the weights of every layer quantized as `quant` has it, which names no layers."""
        return dataclasses.replace(self, decoder=dataclasses.replace(self.decoder, quant=quant))

    def with_cache(self, dtype: StateDtype) -> "Outline":
        """The outline with keys and values stored in `dtype`. Raises ConfigError where layers keep none."""
        return dataclasses.replace(self, decoder=self.decoder.with_cache(dtype))

    @property
    def config(self) -> HFConfig:
        """The model's config; its number of layers may be smaller."""
        return self.decoder.config

    @cached_property
    def parameter_count(self) -> int:
        """Parameters of the model, unpadded."""
        return sum(p.elements for p in self.parameters(1))

    @cached_property
    def at_degree(self) -> Callable[[int], Decoder]:
        """`decoder` at a degree."""
        return functools.cache(lambda tp_degree: dataclasses.replace(self.decoder, tp_degree=tp_degree))

    def padding(self, tp_degree: int) -> Padding:
        return self.at_degree(tp_degree).padding

    @cached_property
    def parameters(self) -> Callable[[int], tuple[Parameter, ...]]:
        """The parameters at a degree, padded and split."""
        return functools.cache(self._parameters)

    def _parameters(self, tp_degree: int) -> tuple[Parameter, ...]:
        quantized = self.at_degree(tp_degree)
        decoder = dataclasses.replace(quantized, quant=None)
        rows = {row.target: row for row in decoder.rows}
        of_layers = {row.at(0).target for row in decoder.table if "{i}" in row.target}
        repeats = self.layers - decoder.config.layers + 1
        return tuple(
            Parameter(
                rows.get(path),
                parameter.shape,
                tp_degree if AXIS in decoder.partition(path) else 1,
                repeats if path in of_layers else 1,
                quantized.forms.get(path),
            )
            for path, parameter in decoder.abstract_params("uint8").items()
        )

    @cached_property
    def weight_bytes(self) -> Callable[[int, int], int]:
        """Bytes of the parameters that each core holds, padded, and split where they are, by degree and itemsize."""
        return functools.cache(lambda tp_degree, itemsize: sum(p.stored(itemsize) for p in self.parameters(tp_degree)))

    def cache_bytes(self, tp_degree: int, batch: int, positions: int, itemsize: int) -> int:
        """Bytes of the state table (keys and values) that each core holds, of `batch` slots of `positions`."""
        decoder = self.at_degree(tp_degree)
        return decoder.state_bytes(batch, positions, itemsize) * self.layers // decoder.config.layers

    @property
    def active_parameter_count(self) -> int:
        """Parameters of the model, counting only as many experts as a token uses."""
        return sum(self._of_chosen(p, p.elements, 1) for p in self.parameters(1))

    def read_elements(self, tp_degree: int, rows: int = 1) -> int:
        """Parameters that a decode step of `rows` reads on each core: all but the tables from which it looks up single
        rows, and counting only the experts that are chosen."""
        return self._read(tp_degree, rows, lambda p: p.per_core)

    def read_bytes(self, tp_degree: int, rows: int, itemsize: int) -> int:
        """Their bytes, as stored."""
        return self._read(tp_degree, rows, lambda p: p.stored(itemsize))

    def _read(self, tp_degree: int, rows: int, size: Callable[[Parameter], int]) -> int:
        parameters = self.parameters(tp_degree)
        vocabulary = sorted((p.per_core, -size(p)) for p in parameters if p.is_vocabulary_table)
        looked_up = sum(size(p) for p in parameters if p.is_looked_up) - sum(least for _, least in vocabulary[:-1])
        return sum(self._of_chosen(p, size(p), rows) for p in parameters) - looked_up

    def multiplied_elements(self, tp_degree: int, rows: int) -> int:
        """Of these, those by which each of `rows` is multiplied, as jx_neuron.nn.ops.Ops computes experts: by those
        chosen, by every one, or in blocks, whose empty places count."""
        chosen, e = self.config.chosen or 0, self.config.sizes.get("e", 1)
        if count := self.blocks(tp_degree, rows):
            experts = count * blocks.SIZE / rows
        else:
            experts = chosen if rows * chosen < e else e
        return self.read_elements(tp_degree, 0) + round(self.expert_elements(tp_degree) * experts)

    def expert_elements(self, tp_degree: int) -> float:
        """Parameters of one expert, of all layers, that each core holds; 0 where there are none."""
        of_experts = sum(p.per_core for p in self.parameters(tp_degree) if p.is_of_experts)
        return of_experts / self.config.sizes.get("e", 1)

    def blocks(self, tp_degree: int, rows: int) -> int:
        """In how many blocks the experts compute `rows` of a layer; 0 where they do not."""
        chosen, sizes = self.config.chosen, self.config.sizes
        if chosen is None or rows * chosen < sizes["e"]:
            return 0
        width = self.padding(tp_degree).size("m") // tp_degree
        pay = blocks.pay(rows, chosen, sizes["e"], width)
        return blocks.count(rows * chosen, sizes["e"]) if pay else 0

    def block_bytes(self, tp_degree: int, rows: int, itemsize: int) -> int:
        """The bytes that a core reads and writes for blocks, besides each parameter once: the parameters of an expert
        for each further block, and the inputs and outputs of blocks, which are read again."""
        if not (count := self.blocks(tp_degree, rows)):
            return 0
        more = max(count - self.config.sizes["e"], 0) * self.expert_elements(tp_degree)
        layers = sum(p.count for p in self.parameters(1) if p.row is not None and p.row.letters == ["e", "m", "d"])
        return round(more + 3 * layers * count * blocks.SIZE * self.config.sizes["d"]) * itemsize

    def _of_chosen(self, parameter: Parameter, elements: int, rows: int) -> int:
        """The elements of a parameter that `rows` use."""
        chosen = self.config.chosen
        if chosen is None or not parameter.is_of_experts:
            return elements
        e = self.config.sizes["e"]
        return elements * min(rows * chosen, e) // e

    def overhead(self, tp_degree: int) -> float:
        """Elements that padding and replicated key/value heads add, as a fraction of the parameters."""
        return sum(p.elements for p in self.parameters(tp_degree)) / self.parameter_count - 1

    @cached_property
    def all_reduces(self) -> float:
        """All-reduces of one layer in a decode step; the mean where layers differ."""
        return collectives.all_reduces(dataclasses.replace(self.decoder, quant=None))  # which scales do not change
