"""Layers shared by the decoders, as flax nnx modules.

Array suffixes: b rows, t tokens, s positions, d model width, n query
heads, k key/value heads, h head size, f MLP width, v vocabulary. Layers take
their sizes from their arrays, not from a config, so the same module runs with
heads, MLP and vocabulary padded for tensor parallelism.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jx_neuron.nn.kernel import Indexed, matmul
from jx_neuron.nn.ops import Ops, barrier, ops
from jx_neuron.nn.quantized import Quantized
from jx_neuron.nn.state import LayerState, State


class Layers(nnx.List[Any]):
    """A model's blocks, applied one after the other.

    On a CPU, blocks that repeat with a period (most models' have one of 1) are stacked, and a program loops over the
    periods: its size does not grow with the number of layers.
    """

    def __init__(self, blocks: Iterable[nnx.Module] = ()):
        self._depth: int | None = None
        super().__init__(blocks)

    def __call__(self, x: Array, state: State, *args: Any) -> tuple[Array, State]:
        """x through every block, called as block(x, its layer's state, *args), and the state written."""
        return self._span(0, len(self), x, state, *args)

    def tapped(self, taps: Sequence[int], x: Array, state: State, *args: Any) -> tuple[Array, State, list[Array]]:
        """The same, and what enters the layers `taps`, ascending."""
        entering = []
        for first, last in pairwise((0, *taps, len(self))):
            x, state = self._span(first, last, x, state, *args)
            entering.append(x)
        return x, state, entering[:-1]

    def _span(self, first: int, last: int, x: Array, state: State, *args: Any) -> tuple[Array, State]:
        """x through the blocks from `first` to before `last`."""
        if self._depth is None:
            return through(list(self)[first:last], x, state, *args, first=first)
        period, periods = self._length, last // self._length
        begin = -(-first // period)  # whole periods are looped over

        def apply_period(number: Array, carry: tuple[Array, State]) -> tuple[Array, State]:
            x, state = carry
            for index in range(period):
                x, part = self._block(index, number)(x, state.of_period(number, index, period), *args)
                state = part.state
            return x, state

        if (
            begin >= periods
            or not state.repeats(period, self._depth // period)
            or _avals(jax.eval_shape(apply_period, np.int32(0), (x, state))) != _avals((x, state))
        ):
            return through(self[first:last], x, state, *args, first=first)
        x, state = through(self[first : period * begin], x, state, *args, first=first)
        x, state = jax.lax.fori_loop(begin, periods, apply_period, (x, state))
        return through(self[period * periods : last], x, state, *args, first=period * periods)

    @property
    def period(self) -> int:
        """The least p such that block i is like block i mod p: of the same graph and shapes."""
        blocks = [(graph, _avals(params)) for graph, params in map(nnx.split, self)]
        return next(p for p in range(1, len(self) + 1) if all(one == blocks[i % p] for i, one in enumerate(blocks)))

    def stack(self) -> int | None:
        """Keeps one period of blocks, each to hold the parameters of every block like it along a first axis, which the
        caller gives them. Returns the period; None, with nothing changed, where no two periods fit."""
        depth, period = len(self), self.period if len(self) else 1
        if depth < 2 * period:
            return None
        del self[period:]
        self._depth = depth
        return period

    def _block(self, index: int, number: Array | int) -> Any:
        """The block at `index` of a period."""
        graph, params = nnx.split(self._get_elem(index))

        def of_period(stack: Any) -> Any:
            if isinstance(stack, Indexed):
                return stack.of_period(number)
            return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)

        return nnx.merge(graph, jax.tree.map(of_period, params, is_leaf=lambda leaf: isinstance(leaf, Indexed)))

    def __len__(self) -> int:
        return self._length if self._depth is None else self._depth

    def __getitem__(self, index: Any) -> Any:
        if self._depth is None:
            return super().__getitem__(index)
        if isinstance(index, slice):
            return [self[i] for i in range(self._depth)[index]]
        layer = range(self._depth)[index]
        return self._block(layer % self._length, layer // self._length)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def through(blocks: Iterable[nnx.Module], x: Array, state: State, *args: Any, first: int = 0) -> tuple[Array, State]:
    """x through each block, of which the first is that of layer `first`, and the state written.

    Blocks that differ in their parameters alone are traced once.
    """
    if not state.layout.stacked:
        for layer, (graph, params) in enumerate(map(nnx.split, blocks), first):
            x, own = _apply(graph, ops(), params, state.alone(layer), x, *args)
            state = state.with_alone(layer, own)
        return x, state
    like = {state.kind(layer): layer for layer in reversed(range(len(state.layers)))}
    for layer, (graph, params) in enumerate(map(nnx.split, blocks), first):
        # behind the barrier, and as one layer of the kind, for what reads and writes the state to be compiled once
        index, number = (barrier(np.int32(n)) for n in (state.place(layer)[1], layer))
        x, state = _apply(graph, ops(), params, LayerState(state, index, number, like[state.kind(layer)]), x, *args)
    return x, state


@partial(jax.jit, static_argnums=(0, 1))
def _apply(graph: Any, _: Ops, params: Any, part: LayerState, x: Array, *args: Any) -> tuple[Array, State]:
    """One block, traced once for each graph and table of equations."""
    x, part = nnx.merge(graph, params)(x, part, *args)
    return x, part.state


def _avals(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@partial(jax.jit, static_argnums=(1, 2))
def random_normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    """Normal numbers of a standard deviation."""
    return scale * jax.random.normal(key, shape)


class LinearParams(nnx.Module):
    """kernel [*inputs, *outputs], or as it is stored (jx_neuron.nn.kernel and .quantized), and bias [*outputs]; with
    adapters (jx_neuron.nn.lora) also A [i, *inputs, r] and B [i, r, *outputs]."""

    lora_a: Any = None
    lora_b: Any = None

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], *, bias: bool, rngs: nnx.Rngs):
        scale = 1.0 / math.sqrt(math.prod(inputs))
        self.kernel: Any = nnx.Param(random_normal(rngs.params(), (*inputs, *outputs), scale))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs))) if bias else None
        self.axes = len(inputs)


class Linear(LinearParams):
    """y = x · kernel + bias, over the last axes of x."""

    def __call__(self, x: Array) -> Array:
        return _completed(matmul(x, self.kernel.get_value(), self.axes), self, x)


class Linears(nnx.Module):
    """Linear layers of one input, by name; a CPU stores their kernels as one, for one product."""

    def __init__(self, inputs: Sequence[int], outputs: Mapping[str, Sequence[int]], *, bias: bool, rngs: nnx.Rngs):
        self.names = tuple(outputs)
        self.fused: Any = nnx.data(None)
        for name, sizes in outputs.items():
            setattr(self, name, LinearParams(inputs, sizes, bias=bias, rngs=rngs))

    @property
    def layers(self) -> list[LinearParams]:
        """Each layer's parameters, in the order of their names."""
        return [getattr(self, name) for name in self.names]

    def __call__(self, x: Array) -> list[Array]:
        """The output of each layer, in the order of their names."""
        if self.fused is None:
            products = [matmul(x, layer.kernel.get_value(), layer.axes) for layer in self.layers]
        else:
            products = self.fused.get_value().matmul(x)
        return [_completed(y, layer, x) for y, layer in zip(products, self.layers, strict=True)]

    def fuse(self, kernel: Any) -> None:
        """Stores `kernel`, a parameter that holds the kernels of all layers, in their place."""
        for layer in self.layers:
            del layer.kernel
        self.fused = kernel


def _completed(y: Array, layer: LinearParams, x: Array) -> Array:
    """y = x · kernel, with what the rows' adapters add, and the bias."""
    y = _adapted(y, layer, x, layer.axes)
    return (y if layer.bias is None else y + layer.bias[...]).astype(x.dtype)


def _adapted(y: Array, layer: Any, x: Array, axes: int) -> Array:
    if layer.lora_a is None:
        return y
    return y + ops().lora(x, layer.lora_a.get_value(), layer.lora_b.get_value(), axes).astype(y.dtype)


class Embedding(nnx.Module):
    """A table [entries, d], read by index; `attend` is its use as a language-model head, which may have adapters."""

    lora_a: Any = None
    lora_b: Any = None

    def __init__(self, entries: int, d: int, *, rngs: nnx.Rngs):
        self.embedding: Any = nnx.Param(random_normal(rngs.params(), (entries, d), 0.02))

    def __call__(self, index_bt: Array) -> Array:
        if isinstance(self.embedding, Quantized):
            return self.embedding.rows(index_bt)
        return self.embedding[...].at[index_bt].get(mode="clip")

    def attend(self, x_btd: Array) -> Array:
        """Logits [b, t, v] = x · tableᵀ."""
        if isinstance(self.embedding, Quantized):
            y_btv = ops().matmul_scaled_rows(x_btd, self.embedding.codes[...], self.embedding.scales[...])
        else:
            y_btv = ops().matmul_rows(x_btd, self.embedding[...])
        return _adapted(y_btv, self, x_btd, 1)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) · scale + bias over the last axis, in float32 (Ba et al., arXiv:1607.06450).

    `shape` is of scale and bias: the last axis, or several, such as (n, h) where each head has its own.
    offset: 1 where checkpoints have scales less one, as Nemotron's do.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        eps: float,
        *,
        affine: bool = True,
        bias: bool = True,
        offset: float = 0.0,
    ):
        self.scale = nnx.Param(jnp.full(shape, 1 - offset)) if affine else None
        self.bias = nnx.Param(jnp.zeros(shape)) if affine and bias else None
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - ops().mean(y)
        y = y * jax.lax.rsqrt(ops().mean(y * y) + self.eps)
        if self.scale is not None:
            y = y * _scale(self.scale, self.offset)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · (offset + scale) over the last axis, in float32 (Zhang, Sennrich, arXiv:1910.07467).

    offset: 1 where checkpoints have scales less one, as Gemma's do.
    """

    def __init__(self, d: int, eps: float, *, affine: bool = True, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full((d,), 1 - offset)) if affine else None
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(ops().mean(y * y) + self.eps)
        if self.scale is not None:
            y = y * _scale(self.scale, self.offset)
        return y.astype(x.dtype)


def _scale(scale: nnx.Param[Array], offset: float) -> Array:
    return offset + scale[...] if offset else scale[...]


class HeadsRMSNorm(nnx.Module):
    """RMSNorm over all heads together, [b, t, n, h], with scale [n, h] (OLMo 2, arXiv:2501.00656).

    Heads of zeros may be added to the `heads` that there are, and heads copied: the mean is of the `heads` alone.
    """

    def __init__(self, heads: int, h: int, eps: float):
        self.scale = nnx.Param(jnp.ones((heads, h)))
        self.size, self.eps = heads * h, eps

    def __call__(self, x_btnh: Array, copies_n: Array | None = None) -> Array:
        """copies_n: how often each head is there, of `head_copies`; None where each is there once."""
        y_btnh = x_btnh.astype(jnp.float32)
        squares_btnh = y_btnh * y_btnh if copies_n is None else y_btnh * y_btnh / copies_n[:, None]
        squares_bti = squares_btnh.reshape(*x_btnh.shape[:2], -1)
        mean_bt1 = ops().mean(squares_bti) * (squares_bti.shape[-1] / self.size)
        y_btnh = y_btnh * jax.lax.rsqrt(mean_bt1 + self.eps)[..., None]
        return (y_btnh * self.scale[...]).astype(x_btnh.dtype)


def head_copies(number_n: Array) -> Array:
    """How many heads have the same number, float32 [n]."""
    return jnp.sum(number_n[:, None] == number_n, axis=-1, dtype=jnp.float32)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


# https://github.com/huggingface/transformers/blob/main/src/transformers/activations.py
ACT: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
