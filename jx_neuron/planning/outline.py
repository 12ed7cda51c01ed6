"""A model's sizes at any tensor-parallel degree, from its config alone: no weight is read and no device taken."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.weights import W
from jx_neuron.models import Decoder, family, model_types
from jx_neuron.nn import cache
from jx_neuron.nn.sharding import AXIS, Padding


@dataclass(frozen=True)
class Parameter:
    """A parameter of one layer, or of none: its padded `shape` over all cores, and how many layers have one."""

    row: W | None
    shape: tuple[int, ...]
    cores: int
    count: int

    @property
    def elements(self) -> int:
        """Over all cores and layers, what is whole on every core counted once."""
        return math.prod(self.shape) * self.count

    @property
    def per_core(self) -> int:
        """Elements that each core holds, over all layers."""
        return self.elements // self.cores

    @property
    def is_position_table(self) -> bool:
        return self.row is not None and "s" in self.row.letters

    @property
    def is_vocabulary_table(self) -> bool:
        return self.row is not None and len(self.row.letters) > 1 and self.row.letters[0] == "v"


@dataclass(frozen=True, eq=False)
class Outline:
    """What planning asks of a model.

    decoder: the model, or one like it with fewer layers.
    layers:  how many the model has.
    """

    decoder: Decoder
    layers: int

    @classmethod
    def of(cls, model: "Mapping[str, Any] | Decoder | Outline") -> "Outline":
        """Of a parsed config.json, or of a decoder. Raises ConfigError where the config is not supported."""
        if isinstance(model, Outline):
            return model
        if isinstance(model, Decoder):
            return cls(dataclasses.replace(model, tp_degree=1), model.config.layers)
        field = _layers_field(model.get("model_type"))
        if field is None:
            return cls.of(Decoder.from_config(model))
        config = family(model["model_type"]).Config.from_hf(model)
        of_one = {"model_type": config.MODEL_TYPE, **config.to_hf(), field: 1}
        return cls(Decoder.from_config(of_one), config.layers)

    @property
    def config(self) -> HFConfig:
        """The model's config, but for its number of layers."""
        return self.decoder.config

    @cached_property
    def parameter_count(self) -> int:
        """Parameters of the model, unpadded."""
        return sum(p.elements for p in self.parameters(1))

    def padding(self, tp_degree: int) -> Padding:
        return _padding(self, tp_degree)

    def parameters(self, tp_degree: int) -> tuple[Parameter, ...]:
        """The parameters as they are held at a degree."""
        return _parameters(self, tp_degree)

    def weight_bytes(self, tp_degree: int, itemsize: int) -> int:
        """Bytes of parameters that each core holds: split and padded, or whole."""
        return itemsize * sum(p.per_core for p in self.parameters(tp_degree))

    def cache_bytes(self, tp_degree: int, batch: int, slots: int, itemsize: int) -> int:
        """Bytes of keys and values that each core holds."""
        heads = self.padding(tp_degree).size("k") // tp_degree
        return 2 * self.layers * itemsize * math.prod(cache.shape(batch, heads, slots, self.config.sizes["h"]))

    def read_elements(self, tp_degree: int) -> int:
        """Parameters that a decode step reads on each core: all but those of tables it looks single rows up in."""
        found = self.parameters(tp_degree)
        vocabulary = [p.per_core for p in found if p.is_vocabulary_table]
        looked_up = sum(p.per_core for p in found if p.is_position_table) + sum(sorted(vocabulary)[:-1])
        return sum(p.per_core for p in found) - looked_up

    def overhead(self, tp_degree: int) -> float:
        """What padding and replicated key/value heads add to the parameters, as a fraction of them."""
        return sum(p.elements for p in self.parameters(tp_degree)) / self.parameter_count - 1

    @cached_property
    def all_reduces(self) -> int:
        """All-reduces of a layer: one for each projection whose input is split, or one for their sum where the
        residual is parallel, as GPT-J's is."""
        of = self.decoder
        split = [
            row
            for row in of.table
            if "{i}" in row.target
            and row.at(0).target in of.shapes
            and row.letters[-1] == "d"
            and tuple(row.partition)[:1] == (AXIS,)
        ]
        return 1 if of.model_type == "gptj" else len(split)


@lru_cache(maxsize=256)
def _parameters(outline: Outline, tp_degree: int) -> tuple[Parameter, ...]:
    decoder = dataclasses.replace(outline.decoder, tp_degree=tp_degree)
    rows = {row.target: row for row in decoder.rows}
    of_layers = {row.at(0).target for row in decoder.table if "{i}" in row.target}
    repeats = outline.layers - decoder.config.layers + 1
    return tuple(
        Parameter(
            rows.get(path),
            parameter.shape,
            tp_degree if AXIS in decoder.partition(path) else 1,
            repeats if path in of_layers else 1,
        )
        for path, parameter in decoder.abstract_params("uint8").items()
    )


@lru_cache(maxsize=256)
def _padding(outline: Outline, tp_degree: int) -> Padding:
    return Padding(outline.config.sizes, tp_degree)


def _layers_field(model_type: Any) -> str | None:
    """The config field that counts layers, where the family is one of ours: there, all layers are alike."""
    if model_type not in model_types():
        return None
    config = family(model_type).Config
    if not config.__module__.startswith("jx_neuron.models."):
        return None
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return next((name for name in ("num_hidden_layers", "n_layer") if name in names), None)
