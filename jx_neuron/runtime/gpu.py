"""A model on one GPU. Its kernels are stored with output axes first, as in most checkpoints (docs/notes/gpu.md)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import Params, Source
from jx_neuron.nn.kernel import inputs_first, matmul, outputs_first
from jx_neuron.nn.layers import LinearParams
from jx_neuron.nn.ops import Ops
from jx_neuron.nn.quantized import Quantized
from jx_neuron.runtime.sharded import Sharded


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclass(frozen=True)
class OutputsFirst:
    """A matrix as [*outputs, *inputs], with `axes` input axes."""

    array: Array
    axes: int

    def matmul(self, x: Array) -> list[Array]:
        kernel, rows = self[...], x.shape[: x.ndim - self.axes]
        if x.size != np.prod(kernel.shape[: self.axes]):
            return [matmul(x, kernel, self.axes)]
        return [_matmul_row(x, kernel, self.axes).reshape(*rows, *kernel.shape[self.axes :])]

    def __getitem__(self, index: Any) -> Array:
        return inputs_first(self.array, self.axes)[index]


class GpuOps(Ops):
    """Equations for a GPU: a single row is multiplied by a reduction. Whether blocks pay is not measured."""

    IN_BLOCKS = False

    def matmul_rows(self, x: Array, table_nk: Array) -> Array:
        if x.size != x.shape[-1]:
            return super().matmul_rows(x, table_nk)
        return _matmul_row(x, table_nk.T, 1).reshape(*x.shape[:-1], -1)


def _matmul_row(x: Array, kernel: Array, axes: int) -> Array:
    """x · kernel of a single row, as a reduction, which reaches more of a GPU's bandwidth than a dot."""
    wide_x, wide_kernel = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, kernel))
    terms = wide_x.reshape(*kernel.shape[:axes], *[1] * (kernel.ndim - axes)) * wide_kernel
    return terms.sum(range(axes)).astype(jnp.result_type(x, kernel))


class OneGPU(Sharded):
    """A decoder's parameters and steps on one GPU."""

    @property
    def ops(self) -> GpuOps:
        return GpuOps()

    def _place(self, source: Source) -> Params:
        module = self._decoder.bind(self._decoder.abstract_params(self._dtype))
        axes = {
            ".".join(map(str, (*path, "kernel"))): node.axes
            for path, node in nnx.iter_graph(module)
            if isinstance(node, LinearParams) and not isinstance(node.kernel, Quantized)
        }
        transposed = {path: ((path,), lambda kernels, n=n: outputs_first(kernels[0], n)) for path, n in axes.items()}
        params = source.place(self._mesh, transposed)
        return {path: OutputsFirst(a, axes[path]) if path in axes else a for path, a in params.items()}
