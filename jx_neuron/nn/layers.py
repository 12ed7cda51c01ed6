"""Layers shared by the decoders, as flax nnx modules.

Array suffixes: b rows, t tokens, s positions, d model width, n query
heads, k key/value heads, h head size, f MLP width, v vocabulary. Layers take
their sizes from their arrays, not from a config, so the same module runs with
heads, MLP and vocabulary padded for tensor parallelism.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jx_neuron.nn.ops import barrier, mean, product, product_with_rows
from jx_neuron.nn.state import State


class Layered(NamedTuple):
    """A parameter of one of a model's layers, where what each layer has of them lies in one array: of(layer)[which]."""

    of: Callable[[Any], Sequence[Array]]
    which: int
    layer: int


_layered: ContextVar[Mapping[int, Layered]] = ContextVar("_layered", default=MappingProxyType({}))


@contextmanager
def lying_together(parameters: Sequence[tuple[Array, Layered]]) -> Iterator[None]:
    """Tells `through`, in this context, which parameters of a bound model lie together."""
    token = _layered.set({id(array): of for array, of in parameters})
    try:
        yield
    finally:
        _layered.reset(token)


def through(layers: Sequence[Callable[..., Any]], x: Array, state: State, *args: Any) -> tuple[Array, State]:
    """x through a model's `layers`, modules called as layer(x, their part of the state, *args), and the state written.

    For a CPU, layers that differ in their parameters alone are traced once, and where these lie together the program
    goes through them in a loop.
    """
    if not state.layout.stacked:
        for i, layer in enumerate(layers):
            x, part = layer(x, state.of_layer(i), *args)
            state = part.state
        return x, state
    graphs, parameters = zip(*map(nnx.split, layers), strict=True)
    if (parameters_at := _looped(graphs, parameters)) is not None:

        def layer_at(layer: Any, carry: tuple[Array, State]) -> tuple[Array, State]:
            return _layer(graphs[0], parameters_at(layer), layer, carry, *args)

        if _kinds(jax.eval_shape(layer_at, np.int32(0), (x, state))) == _kinds((x, state)):
            return jax.lax.fori_loop(0, len(parameters), layer_at, (x, state))
    for i, (graph, own) in enumerate(zip(graphs, parameters, strict=True)):
        # behind the barrier, for what reads and writes the state to be compiled once too
        x, state = _traced_once(graph, own, barrier(np.int32(i)), (x, state), *args)
    return x, state


def _layer(graph: Any, parameters: Any, layer: Any, carry: tuple[Array, State], *args: Any) -> tuple[Array, State]:
    x, state = carry
    x, part = nnx.merge(graph, parameters)(x, state.of_layer(layer), *args)
    return x, part.state


_traced_once = jax.jit(_layer, static_argnums=0)


def _looped(graphs: Sequence[Any], states: Sequence[Any]) -> Callable[[Any], Any] | None:
    """What gives the state of any layer, where layers are alike and their parameters lie together."""
    known = _layered.get()
    leaves = [[known.get(id(leaf)) for leaf in jax.tree.leaves(state)] for state in states]
    first = [layered for layered in leaves[0] if layered is not None]
    for i, (graph, layer) in enumerate(zip(graphs, leaves, strict=True)):
        if graph != graphs[0] or layer != [layered._replace(layer=i) for layered in first]:
            return None

    def state_at(layer: Any) -> Any:
        found = {of: of(layer) for of in dict.fromkeys(layered.of for layered in first)}
        return jax.tree.unflatten(jax.tree.structure(states[0]), [found[of][which] for of, which, _ in first])

    return state_at


def _kinds(given: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(given)]


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    return scale * jax.random.normal(key, shape)


class Linear(nnx.Module):
    """y = x · kernel + bias, over the last axes of x; kernel [*inputs, *outputs], bias [*outputs]."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], *, bias: bool, rngs: nnx.Rngs):
        scale = 1.0 / math.sqrt(math.prod(inputs))
        self.kernel = nnx.Param(_normal(rngs.params(), (*inputs, *outputs), scale))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs))) if bias else None
        self.axes = len(inputs)

    def __call__(self, x: Array) -> Array:
        return _products(x, [self])[0]


class Linears(nnx.Module):
    """Linear layers of one input, by name; a CPU computes them as one product, over kernels that lie together."""

    def __init__(self, inputs: Sequence[int], outputs: Mapping[str, Sequence[int]], *, bias: bool, rngs: nnx.Rngs):
        self.names = tuple(outputs)
        for name, of in outputs.items():
            setattr(self, name, Linear(inputs, of, bias=bias, rngs=rngs))

    def __call__(self, x: Array) -> list[Array]:
        """What each gives, in the order of their names."""
        return _products(x, [getattr(self, name) for name in self.names])


def _products(x: Array, linears: Sequence[Linear]) -> list[Array]:
    found = product(x, [linear.kernel[...] for linear in linears], linears[0].axes)
    return [y if linear.bias is None else y + linear.bias[...] for y, linear in zip(found, linears, strict=True)]


def kernels(module: nnx.Module) -> dict[tuple[str, ...], int]:
    """The kernels of a model by dotted path, those of a `Linears` together, and how many input axes they have."""
    nodes = [(path, node) for path, node in nnx.iter_graph(module) if isinstance(node, Linear | Linears)]
    several = {path: node for path, node in nodes if isinstance(node, Linears)}
    alone = {path: node for path, node in nodes if isinstance(node, Linear) and path[:-1] not in several}
    found = {tuple((*path, name) for name in of.names): getattr(of, of.names[0]).axes for path, of in several.items()}
    found |= {(path,): node.axes for path, node in alone.items()}
    return {tuple(".".join(map(str, (*path, "kernel"))) for path in of): axes for of, axes in found.items()}


class Embedding(nnx.Module):
    """A table [entries, d], read by index; `attend` is its use as a tied language-model head."""

    def __init__(self, entries: int, d: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs.params(), (entries, d), 0.02))

    def __call__(self, index_bt: Array) -> Array:
        return self.embedding[...].at[index_bt].get(mode="clip")

    def attend(self, x_btd: Array) -> Array:
        """Logits [b, t, v] = x · tableᵀ."""
        return product_with_rows(x_btd, self.embedding[...])


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) · scale + bias over the last axis, in float32 (Ba et al., arXiv:1607.06450).

    `shape` is of scale and bias: the last axis, or several, such as (n, h) where each head has its own.
    """

    def __init__(self, shape: int | tuple[int, ...], eps: float, *, affine: bool = True, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(shape)) if affine else None
        self.bias = nnx.Param(jnp.zeros(shape)) if affine and bias else None
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - mean(y)
        y = y * jax.lax.rsqrt(mean(y * y) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis, in float32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones((d,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(mean(y * y) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


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
