"""Device memory of one core, item by item, and what the host needs to load a model.

Weights and KV cache are exact. Activations are an upper estimate of the intermediate results that are live at one time,
or taken from the lowered programs. Code and DMA rings are allowances:

- Code: 96 MB of microcode a physical core.
  https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/explore/device-memory.html
- Rings: descriptors of the DMA engines' transfers. They grow with the programs, and are known only once these are
  compiled. The allowance is that of the first release's examples (29 GB for opt-13b, 66 GB for opt-30b, both 5 % above
  weights and cache). As much as 6.5 GB for 8.2 GB of tensors has been reported for a core: a plan without room for
  so much is called tight.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jx_neuron.lowering.hlo.graph import parse
from jx_neuron.lowering.model import lower_model
from jx_neuron.lowering.verify.footprint import peak_bytes
from jx_neuron.models import Decoder
from jx_neuron.nn.blocks import SIZE
from jx_neuron.nn.recurrent import CHUNK
from jx_neuron.nn.sharding import Padding
from jx_neuron.planning.instances import Instance
from jx_neuron.planning.outline import Outline
from jx_neuron.step.buckets import Buckets
from jx_neuron.step.program_key import ProgramKey

CODE = 96 * 2**20
RINGS = 0.05
RINGS_SEEN = 6.5 / 8.2


@dataclass(frozen=True)
class Memory:
    """Bytes of one core."""

    weights: int
    cache: int
    activations: int
    code: int
    rings: int

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return self.weights + self.cache + self.activations + self.code + self.rings

    @property
    def worst(self) -> int:
        """The total with the largest DMA rings that were reported."""
        return self.total - self.rings + round(RINGS_SEEN * (self.weights + self.cache))

    def items(self) -> dict[str, int]:
        """Each item by name."""
        return asdict(self)

    def as_dict(self) -> dict[str, int]:
        """The items and their total."""
        return self.items() | {"total": self.total}


def core_memory(
    outline: Outline,
    instance: Instance,
    tp_degree: int,
    batch_size: int,
    buckets: Buckets,
    itemsize: int,
    activations: int | None = None,
) -> Memory:
    """Memory of one core for `batch_size` rows; `activations` replaces the estimate."""
    weights = outline.weight_bytes(tp_degree, itemsize)
    cache = outline.cache_bytes(tp_degree, batch_size, buckets.capacity, itemsize)
    if activations is None:
        activations = max(
            activation_bytes(outline, tp_degree, key, itemsize) for key in buckets.programs(batch_size, 1)
        )
    return Memory(weights, cache, activations, CODE * instance.device.lnc, round(RINGS * (weights + cache)))


def activation_bytes(outline: Outline, tp_degree: int, key: ProgramKey, itemsize: int) -> int:
    """An upper estimate of a program's intermediate results at their peak."""
    d, v = outline.config.sizes["d"], outline.padding(tp_degree).size("v") // tp_degree
    rows, positions = key.rows * key.tokens, key.positions
    chosen = outline.config.chosen
    residual = rows * d * (4 + 2 * itemsize)  # the float32 of norms, the sum, and what an all-reduce gives
    logits = key.rows * (key.tokens if key.gives_every else 1) * 2 * v * 4

    def layer(padding: Padding) -> int:
        n, k, f, m, p, g = (padding.size(c) // tp_degree if c in padding.sizes else 0 for c in "nkfmpg")
        h, i, j = (padding.sizes.get(c, 0) for c in "hij")
        projections = rows * (2 * n + 4 * k) * h * itemsize  # and rotated
        scores = rows * n * positions * (4 + itemsize)  # float32, then as probabilities
        state = 2 * key.rows * k * positions * h * itemsize
        mlp = rows * 3 * f * itemsize
        if chosen is not None:
            e, few = padding.sizes["e"], rows * chosen
            if count := outline.blocks(tp_degree, rows):  # outputs of blocks, and the rows taken from them
                mlp += itemsize * d * (count * SIZE + few)
            else:  # features of all experts, or the parameters of those chosen
                mlp += 3 * m * itemsize * (few * (d + 1) if few < e else rows * e)
        if "g" not in padding.sizes:
            return max(projections + scores + state, mlp)
        chunk = min(key.tokens, CHUNK)  # of a recurrence, in float32: its inputs and results, decays, and states
        recurrence = 4 * (rows * 4 * (p * i + g * j) + key.rows * p * (3 * chunk**2 + 3 * i * j))
        return max(projections + scores + state, recurrence, mlp)

    return residual + max(*map(layer, outline.padding(tp_degree).distinct), logits)


def lowered_activation_bytes(decoder: Decoder, key: ProgramKey, positions: int, dtype: np.dtype[Any]) -> int:
    """The peak of materialized intermediate results in the lowered program of `key`: a lower bound.

    Raises LoweringError where the program cannot be lowered.
    """
    (program,) = lower_model(decoder, [key], key.rows, positions, dtype)
    return peak_bytes(parse(program.hlo_module).entry)


def host_bytes(outline: Outline, tp_degree: int, itemsize: int) -> int:
    """The peak of host memory while a checkpoint is loaded: every core's parameters, and two copies of the largest
    tensor, as read (float32 at most) and in the model's layout."""
    return tp_degree * outline.weight_bytes(tp_degree, itemsize) + 2 * 4 * max(
        p.elements // p.count for p in outline.parameters(1)
    )
