"""LoRA adapters side by side: each row of a batch has one of them, or none (Hu et al., arXiv:2106.09685).

    y = x · W + x · A_i · B_i        i the row's adapter, A_0 and B_0 zeros

One program serves rows of any adapters, as in Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al.,
arXiv:2311.03285). Array suffixes are those of jx_neuron.nn.layers, i adapters and r their rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn.adapters import PARTS
from jx_neuron.nn.kernel import Indexed

HEAD = "lm_head"


@partial(jax.tree_util.register_dataclass, data_fields=["array", "adapter_b", "layer"], meta_fields=[])
@dataclass(frozen=True)
class OfRows(Indexed):
    """A or B of every adapter, [i, …], or [l, i, …] of the layers of a stack, and which adapter each row has.

    layer: that of the stack whose A or B it is; None without a stack.
    """

    array: Array
    adapter_b: Array
    layer: Array | int | None = None

    def of_period(self, number: Array | int) -> "OfRows":
        return replace(self, layer=number)

    def gathered(self) -> Array:
        """That of each row: [b, …]."""
        array = self.array if self.layer is None else jax.lax.dynamic_index_in_dim(self.array, self.layer, 0, False)
        return jnp.take(array, self.adapter_b, axis=0, mode="clip")


def selected(params: Mapping[str, Any], adapter_b: Array) -> dict[str, Any]:
    """Parameters in which A and B are those of each row."""
    return {
        path: OfRows(array, adapter_b) if path.rpartition(".")[2] in PARTS else array for path, array in params.items()
    }


def matrices(module: nnx.Module) -> Iterator[str]:
    """The matrices of a module that can have A and B, by path: those of linear layers, and of a head of its own."""
    for path, node in nnx.iter_graph(module):
        name = next((name for name in ("kernel", "embedding") if hasattr(node, name)), None)
        if name and hasattr(node, PARTS[0]) and (name == "kernel" or path == (HEAD,)):
            yield ".".join(map(str, (*path, name)))


def attach(module: nnx.Module, shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> None:
    """Gives layers of a module of shapes A and B, whose shapes are by path."""
    for path, node in list(nnx.iter_graph(module)):
        for part in PARTS:
            if (shape := shapes.get(".".join(map(str, (*path, part))))) is not None:
                setattr(node, part, nnx.Param(jax.ShapeDtypeStruct(shape, dtype)))
