"""A model at one tensor-parallel degree: its functions, and the shapes and partitions of its arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint import weights
from jx_neuron.checkpoint.hf_config import HFConfig
from jx_neuron.checkpoint.quantizing import quantized
from jx_neuron.checkpoint.weights import Copy, Params, W
from jx_neuron.config import QuantizationConfig
from jx_neuron.errors import ConfigError
from jx_neuron.models import checks
from jx_neuron.models.registry import Family, family, model_types, text_config
from jx_neuron.nn import lora, quantizing
from jx_neuron.nn.adapters import Adapters
from jx_neuron.nn.encoded import StateDtype
from jx_neuron.nn.layout import KV, PLAIN, Kept, Layout, S
from jx_neuron.nn.positions import Positions
from jx_neuron.nn.quantized import Form
from jx_neuron.nn.sharding import AXIS, Padding
from jx_neuron.nn.state import State
from jx_neuron.util.pages import gc_paused


class DecoderModule(Protocol):
    """The methods of a family's `Model`: hidden states of each token, then logits of the requested ones."""

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        """Hidden states [b, t, d] of tokens at the positions `at`, and the state with them written."""
        ...

    def logits(self, x_btd: Array) -> Array:
        """Logits [b, t, v] of hidden states."""
        ...


class _SameKey(nnx.RngStream):
    # counting keys under tracing takes time that grows with the square of the layers
    def __call__(self) -> Array:
        return self.key[...]


def _one_key() -> nnx.Rngs:
    rngs: Any = nnx.Rngs(0)
    rngs.default = _SameKey(0, tag="default")
    return cast(nnx.Rngs, rngs)


def outline(family: Family, config: HFConfig) -> Any:
    """The model of `config`, with shapes for parameters."""
    with gc_paused():
        return nnx.eval_shape(lambda: family.Model(config, _one_key()))


def _state(params: Mapping[str, Any]) -> Any:
    paths = (tuple(int(part) if part.isdigit() else part for part in path.split(".")) for path in params)
    return nnx.from_flat_state(cast(Any, dict(zip(paths, map(nnx.Param, params.values()), strict=True))))


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in weights.flatten(nnx.state(module)).items()}


@dataclass(frozen=True)
class Decoder:
    """A model at one tensor-parallel degree, without its parameters: a pure function of them.

    adapters: the ones that it has side by side; None where it has none, and rows no number of one.
    """

    model_type: str
    config: HFConfig
    table: Sequence[W]
    ignore: Sequence[str | Copy]
    graph: Any = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    tp_degree: int = 1
    state: Sequence[S] = KV
    quant: QuantizationConfig | None = None
    adapters: Adapters | None = None

    @classmethod
    def from_config(
        cls, raw: Mapping[str, Any], tp_degree: int = 1, tensors: weights.Tensors | None = None
    ) -> "Decoder":
        """The decoder that a parsed config.json describes; allocates nothing.

        Raises ConfigError that names the field that is not supported, or the row of the weight table that does not fit,
        and CheckpointError where the config's sizes are not those of `tensors`, before it builds.
        """
        raw = text_config(raw)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError("the config has no model_type; it should name one of " + ", ".join(model_types()))
        parts = family(model_type)
        config = parts.Config.from_hf(raw)
        if tensors is not None:
            weights.present(parts.WEIGHTS, config, tensors)
        return cls.made(model_type, parts, config, tp_degree)

    @classmethod
    def made(cls, model_type: str, family: Family, config: HFConfig, tp_degree: int) -> "Decoder":
        """The decoder of a family's config. Raises ConfigError where a part of the family does not fit it."""
        state = getattr(family, "STATE", KV)
        checks.sizes(config, state)
        module = outline(family, config)
        shapes = shapes_of(module)
        checks.table(family.WEIGHTS, config, shapes, complete=True)
        decoder = cls(model_type, config, family.WEIGHTS, family.IGNORE, nnx.graphdef(module), shapes, tp_degree, state)
        decoder._check()
        return decoder

    @classmethod
    def from_module(
        cls, module: nnx.Module, config: HFConfig, table: Sequence[W] = (), tp_degree: int = 1
    ) -> "Decoder":
        """The decoder of a module with its parameters; `table` is needed above a tensor-parallel degree of 1."""
        checks.sizes(config, KV)
        shapes = shapes_of(module)
        checks.table(table, config, shapes, complete=False)
        decoder = cls(config.MODEL_TYPE, config, table, (), nnx.graphdef(module), shapes, tp_degree)
        decoder._check()
        return decoder

    def _check(self) -> None:
        """Raises ConfigError where the splits of weights or the rows of STATE do not fit."""
        checks.splits(self.table, self.padding)
        checks.state(self.state, self.config)
        checks.shared(self.kept, self.config)

    def with_cache(self, dtype: StateDtype) -> "Decoder":
        """The decoder with the entries of all positions, as keys and values are, stored in `dtype`.

        Raises ConfigError where layers keep none.
        """
        state = [row.encoded(dtype) for row in self.state]
        if state == [*self.state]:
            raise ConfigError(f"{self.model_type} keeps no keys and values that could be stored in {dtype}")
        return replace(self, state=state)

    def with_drafts(self) -> "Decoder":
        """The decoder whose recurrent layers also keep what they kept before the last step that verified a draft.

        Raises ConfigError where other layers keep a window of positions, which drafts would overwrite.
        """
        rows = [row for row in self.state if row.position_axis is None]
        if not rows or rows[0].before in self.state:
            return self
        if any(layer.window is not None for layer in self.kept):
            raise ConfigError(f"{self.model_type} verifies no drafts: it has both recurrent layers and sliding windows")
        return replace(self, state=[*self.state, *(row.before for row in rows)])

    def with_adapters(self, adapters: Adapters) -> "Decoder":
        """The decoder with A and B next to the matrices that `adapters` are of, some of `adaptable`."""
        paths = adapters.paths(self.shapes, self.config.layers)
        sizes = {path: self._row[path].sizes(self.config) | adapters.sizes for path in paths}
        shapes = {
            row.target: tuple(sizes[path][letter] for letter in row.letters)
            for path in paths
            for row in self._row[path].low_rank() or ()
        }
        lora.attach(module := self._module, shapes, np.float32)
        return replace(self, graph=nnx.graphdef(module), shapes={**self.shapes, **shapes}, adapters=adapters)

    @cached_property
    def adaptable(self) -> frozenset[str]:
        """The matrices that may have adapters side by side, by path: those of layers, and that of a head."""
        layers = lora.matrices(self._module)
        return frozenset(path for path in layers if path in self._row and self._row[path].low_rank())

    @cached_property
    def padding(self) -> Padding:
        config, more = self.config, self.adapters.sizes if self.adapters else {}
        layers = [{**config.sizes_of(layer), **more} for layer in range(config.layers)]
        return Padding({**config.sizes, **more}, self.tp_degree, layers)

    @cached_property
    def rows(self) -> list[W]:
        """The weight table's rows that this config has parameters for."""
        return [row for row in weights.rows_of(self.table, self.config.layers) if row.target in self.shapes]

    def match(self, tensors: weights.Tensors) -> list[W]:
        """The row of each parameter, with a checkpoint's names. Raises CheckpointError where they do not match."""
        return weights.match(self.table, self.ignore, self.shapes, self.config, tensors)

    def source(self, tensors: weights.Tensors, dtype: Any) -> weights.Source:
        """The parameters of a checkpoint. Raises CheckpointError where tensors and parameters do not match."""
        rows = self.match(tensors)
        return self._quantized(
            lambda dtype: weights.from_checkpoint(rows, self.config, self.padding, tensors, np.dtype(dtype)), dtype
        )

    def source_of(self, params: Mapping[str, Any], dtype: Any) -> weights.Source:
        """The parameters of a module, unpadded."""
        return self._quantized(
            lambda dtype: weights.from_params(params, self.rows, self.padding, np.dtype(dtype)), dtype
        )

    def _quantized(self, source: Callable[[Any], weights.Source], dtype: Any) -> weights.Source:
        if not self.forms:
            return source(dtype)
        return quantized(source(dtype), source(np.float32), self.forms, np.dtype(dtype))

    @cached_property
    def forms(self) -> Mapping[str, Form]:
        """How each parameter that `quant` quantizes is stored. Raises ConfigError where `quant` does not fit."""
        if self.quant is None:
            return {}

        def on_core(path: str) -> tuple[int, ...]:
            names = zip_longest(self._shape(path), self.partition(path))
            return tuple(size // self.tp_degree if name else size for size, name in names)

        return quantizing.forms(self._module, self.quant, on_core)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its quantized parameters."""
        return frozenset(form.kind for form in self.forms.values())

    @property
    def _module(self) -> Any:
        """The model with nothing quantized, and with shapes for parameters."""
        params = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in self.shapes.items()}
        return nnx.merge(self.graph, _state(params))

    @cached_property
    def _stored_graph(self) -> Any:
        if not self.forms:
            return self.graph
        quantizing.replace(module := self._module, self.forms)
        return nnx.graphdef(module)

    @cached_property
    def _stored(self) -> dict[str, tuple[str, str | None]]:
        """The parameter of each array that is stored, by path, and which part of a quantized one it is; in order of
        paths, as programs take them."""
        stored = {
            f"{path}.{part}" if part else path: (path, part)
            for path in self.shapes
            for part in (self.forms[path].parts if path in self.forms else (None,))
        }
        return dict(sorted(stored.items()))

    def bind(self, params: Params, adapter_b: Array | None = None) -> DecoderModule:
        """The module that holds `params`, and where the decoder has adapters the number of each row's."""
        chosen = params if adapter_b is None else lora.selected(params, adapter_b)
        return cast(DecoderModule, nnx.merge(self._stored_graph, _state(chosen)))

    def abstract_params(self, dtype: Any, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters as shapes, padded; sharded over `mesh` where given."""

        def array(name: str, path: str, part: str | None) -> jax.ShapeDtypeStruct:
            shape, row = self._shape(path), self._row.get(path)
            whole = jax.ShapeDtypeStruct(shape, row.dtype(dtype) if row else jnp.dtype(dtype))
            stored = self.forms[path].shapes(shape, jnp.dtype(dtype))[part] if part else whole
            return stored.update(sharding=NamedSharding(mesh, self.partition(name))) if mesh else stored

        return {name: array(name, path, part) for name, (path, part) in self._stored.items()}

    def _shape(self, path: str) -> tuple[int, ...]:
        """That of a parameter that nothing quantizes, padded."""
        return self._row[path].target_shape(self.padding) if path in self._row else tuple(self.shapes[path])

    def partition(self, path: str) -> PartitionSpec:
        """How a parameter, or a part of a quantized one, is split among cores."""
        path, part = self._stored[path] if path not in self.shapes else (path, None)
        spec = self._row[path].partition if path in self._row else PartitionSpec()
        return self.forms[path].partition(part, spec) if part else spec

    def row(self, path: str) -> W | None:
        """The row of the weight table that fills a parameter, or a part of a quantized one."""
        return self._row.get(self._stored[path][0])

    @cached_property
    def _row(self) -> dict[str, W]:
        rows = {row.target: row for row in self.rows}
        for path in self.adapters.paths(self.shapes, self.config.layers) if self.adapters else ():
            rows |= {row.target: row for row in rows[path].low_rank() or ()}
        return rows

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """The state of a sequence in each layer, padded."""
        config = self.config

        def layer(number: int, kind: str, window: int | None, own: bool) -> Kept:
            padding, of_kind = self.padding.of(number), (row for row in self.state if row.of in (None, kind))
            rows = tuple(stored for row in of_kind for stored in row.stored_rows)
            return Kept(rows, tuple(row.padded(padding) for row in rows), window, own)

        layers = zip(range(config.layers), config.types, config.windows, config.own_state, strict=True)
        return tuple(layer(*each) for each in layers)

    def abstract_state(
        self, slots: int, positions: int, dtype: Any, mesh: Mesh | None = None, layout: Layout = PLAIN
    ) -> State:
        """A state table as shapes, padded; sharded over `mesh` where given."""

        state = State.abstract(self.kept, slots, positions, jnp.dtype(dtype), layout)
        if mesh is None:
            return state
        split = state.partition()
        return jax.tree.map(lambda leaf, spec: leaf.update(sharding=NamedSharding(mesh, spec)), state, split)

    @property
    def window(self) -> int | None:
        """How many of a sequence's last positions every layer keeps: 0 with recurrent layers, None for all."""
        if any(row.position_axis is None for layer in self.kept for row in layer.rows):
            return 0
        return min((layer.window for layer in self.kept if layer.window is not None), default=None)

    def slot(self, positions: int) -> dict[str, tuple[int, ...]]:
        """The shape of one slot of each array of a state table on one core, by layer and row of STATE: "0.k"."""
        state, tp = self.abstract_state(1, positions, "uint8"), self.tp_degree
        return {
            name: tuple(
                size // tp if axis == AXIS else size for size, axis in zip_longest(array.shape[1:], row.partition)
            )
            for (name, row), array in zip(self.state_rows.items(), jax.tree.leaves(state.arrays), strict=True)
        }

    @property
    def state_rows(self) -> dict[str, S]:
        """The row of STATE of each array of a state table, by its name in `slot`."""
        groups = PLAIN.groups(self.kept)
        return {f"{layer}.{row.name}": row for layer, group in enumerate(groups) for row in group.rows}

    @property
    def state_dtypes(self) -> dict[str, StateDtype]:
        """The dtypes of arrays that have one of their own, whatever the model's, by name in `slot`."""
        return {name: row.dtype for name, row in self.state_rows.items() if row.dtype is not None}

    def state_bytes(self, slots: int, positions: int, itemsize: int) -> int:
        """Bytes of a state table that each core holds, of `itemsize` bytes an entry that has no dtype of its own."""
        sizes = {name: np.dtype(dtype).itemsize for name, dtype in self.state_dtypes.items()}
        return slots * sum(sizes.get(name, itemsize) * math.prod(shape) for name, shape in self.slot(positions).items())
