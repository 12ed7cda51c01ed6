"""Estimates the time of a token by a roofline model with three constants, fitted on published times.

    time per token       = max(bytes / bandwidth, flops / peak) + layers · (collectives + LAYER + ROW · (batch - 1))
    time to first token  = max(bytes / bandwidth, flops / (EFFICIENCY · peak)) + layers · (collectives + LAYER)
    a collective         = 2 · hops · HOP + 2 · bytes / link, for each all-reduce of a layer

Bytes are counted for each core: its parameters, without lookup tables and without experts that no token uses, and
its part of the KV cache as compiled.
docs/planning.md compares predictions with published times.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from jx_neuron.config import QuantizationConfig
from jx_neuron.nn import latent_attention
from jx_neuron.nn.layout import Kept
from jx_neuron.nn.sharding import Padding
from jx_neuron.planning import published
from jx_neuron.planning.instances import Instance, find
from jx_neuron.planning.outline import Outline
from jx_neuron.step.buckets import Buckets, fit

HOP = 1.5e-6  # "1 to 2 µs a hop inside a node"
FLOAT32 = 1 / 4  # of the bfloat16 rate: 47.5 of 190 TFLOP/s on inf2 and trn1


@dataclass(frozen=True)
class Constants:
    """Fitted constants.

    layer:      seconds of overhead of each layer at batch 1.
    row:        seconds of overhead that each further row adds.
    efficiency: the fraction of the peak rate that the matmuls of a prefill reach.
    """

    layer: float
    row: float
    efficiency: float


FITTED = Constants(layer=125.7e-6, row=13.3e-6, efficiency=0.24)
"""The constants that `fitted` computes from the published rows marked as fitted."""


@dataclass(frozen=True)
class Speed:
    """Predicted seconds of one model on one instance at one degree and itemsize."""

    outline: Outline
    instance: Instance
    tp_degree: int
    itemsize: int
    constants: Constants = FITTED

    def per_token(self, batch: int, positions: int) -> float:
        """Seconds of a decode step over a KV cache of `positions`."""
        outline, tp = self.outline, self.tp_degree
        bytes_read = outline.read_bytes(tp, batch, self.itemsize) + outline.cache_bytes(
            tp, batch, positions, self.itemsize
        )
        fixed = self.constants.layer + self.constants.row * (batch - 1)
        roof = max(bytes_read / self.instance.bandwidth_per_core, self.flops(batch, 1, positions) / self._peak)
        return roof + outline.layers * (self.collectives(batch) + fixed)

    def to_first_token(self, batch: int, tokens: int, positions: int) -> float:
        """Seconds of one prompt chunk of `tokens` a row, over `positions`."""
        outline, tp = self.outline, self.tp_degree
        bytes_moved = (
            outline.weight_bytes(tp, self.itemsize)
            + outline.cache_bytes(tp, batch, positions, self.itemsize)
            + outline.block_bytes(tp, batch * tokens, self.itemsize)
        )
        rate = self._peak * self.constants.efficiency
        roof = max(bytes_moved / self.instance.bandwidth_per_core, self.flops(batch, tokens, positions) / rate)
        return roof + outline.layers * (self.collectives(batch * tokens) + self.constants.layer)

    def prompt_seconds(self, batch: int, tokens: int, buckets: Buckets) -> float:
        """Seconds to the first token of a prompt; a longer one is computed in chunks of the largest context bucket."""
        chunk, total = buckets.context[-1], 0.0
        while tokens > chunk:
            total += self.to_first_token(batch, chunk, buckets.capacity)
            tokens -= chunk
        size = fit(buckets.context, tokens)
        return total + self.to_first_token(batch, size, buckets.capacity if total else size)

    def flops(self, batch: int, tokens: int, positions: int) -> float:
        """FLOPs of one core: matmuls with the parameters (the head for each row's last token alone), attention, and
        recurrences, which multiply each number of their state twice a token."""
        outline, tp = self.outline, self.tp_degree
        head = max((p.per_core for p in outline.parameters(tp) if p.is_vocabulary_table), default=0)
        multiply_adds = (outline.multiplied_elements(tp, batch * tokens) - head) * tokens + head
        decoder = outline.at_degree(tp)
        attention = sum(
            _attention(kept, decoder.padding.of(n), tokens, positions) for n, kept in enumerate(decoder.kept)
        )
        rows, shapes = decoder.state_rows, decoder.slot(1)
        recurrent = sum(math.prod(shapes[name]) for name, row in rows.items() if "s" not in row.letters)
        state = (attention // tp + 2 * tokens * recurrent) * outline.layers // decoder.config.layers
        return 2.0 * batch * (multiply_adds + state)

    def collectives(self, rows: int) -> float:
        """Seconds of one layer's all-reduces, of `rows` hidden states each."""
        if self.tp_degree == 1:
            return 0.0
        moved = rows * self.outline.config.sizes["d"] * self.itemsize
        one = 2 * self.instance.hops(self.tp_degree) * HOP + 2 * moved / self.instance.link(self.tp_degree)
        return self.outline.all_reduces * one

    @property
    def _peak(self) -> float:
        return self.instance.flops_per_core * (FLOAT32 if self.itemsize == 4 else 1)


def speed(outline: Outline, instance: Instance, tp_degree: int, itemsize: int) -> Speed:
    """The predictions where weights and cache entries have `itemsize` bytes."""
    return Speed(outline, instance, tp_degree, itemsize)


@dataclass(frozen=True)
class Compared:
    """A published time and the predicted one, in milliseconds."""

    row: published.Decode | published.Prefill
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.row.milliseconds - 1


def compare(constants: Constants = FITTED) -> list[Compared]:
    """Every published row with its prediction."""
    return [Compared(row, 1e3 * _predict(row, constants)) for row in (*published.DECODE, *published.PREFILL)]


def fitted(decode: Iterable[published.Decode], prefill: Iterable[published.Prefill]) -> Constants:
    """The constants with the least squared relative error on these rows."""
    rows = list(decode)
    zero = Constants(0, 0, 1)
    seconds = np.array([row.milliseconds / 1e3 for row in rows])
    rest = seconds - [_predict(row, zero) for row in rows]
    slopes = np.array([[1, row.batch_size - 1] for row in rows]) * [[_outline(row.model).layers] for row in rows]
    (layer, row_cost), *_ = np.linalg.lstsq(slopes / seconds[:, None], rest / seconds, rcond=None)
    efficiencies = [_efficiency(row, Constants(layer, row_cost, 1)) for row in prefill]
    return Constants(float(layer), float(row_cost), float(np.mean(efficiencies)))


def leave_one_out() -> Iterator[Compared]:
    """Leave-one-out validation: each published decode row, predicted by constants fitted on all the others."""
    for row in published.DECODE:
        constants = fitted((other for other in published.DECODE if other is not row), published.PREFILL)
        yield Compared(row, 1e3 * _predict(row, constants))


def _efficiency(row: published.Prefill, constants: Constants) -> float:
    prediction = _speed(row, constants)
    fixed = prediction.outline.layers * (prediction.collectives(row.tokens) + constants.layer)
    return prediction.flops(1, row.tokens, row.tokens) / prediction._peak / (row.milliseconds / 1e3 - fixed)


def _predict(row: published.Decode | published.Prefill, constants: Constants) -> float:
    prediction = _speed(row, constants)
    if isinstance(row, published.Prefill):
        return prediction.to_first_token(1, row.tokens, row.tokens)
    return prediction.per_token(row.batch_size, row.sequence)


def _speed(row: published.Decode | published.Prefill, constants: Constants) -> Speed:
    quant = QuantizationConfig() if isinstance(row, published.Decode) and row.int8 else None
    prediction = speed(_outline(row.model, quant), find(row.instance), row.tp_degree, 2)
    return dataclasses.replace(prediction, constants=constants)


@cache
def _outline(model: str, quant: QuantizationConfig | None = None) -> Outline:
    return Outline.of(published.CONFIGS[model], quant)


def _attention(kept: Kept, layer: Padding, tokens: int, positions: int) -> int:
    """Multiplications of a layer's scores and values, over all cores; 0 of a layer that has none."""
    if not any("s" in row.letters for row in kept.rows):
        return 0
    if latent_attention.LATENT[0].name in {row.name for row in kept.rows}:
        return layer.size("n") * latent_attention.multiply_adds(layer.sizes, tokens, positions)
    return layer.size("n") * 2 * layer.sizes["h"] * tokens * positions
