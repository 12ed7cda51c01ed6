"""A model as pure functions of its parameters: logits, a step with explicit state, and the parameters as a pytree."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jx_neuron.errors import InputError
from jx_neuron.models import Decoder
from jx_neuron.nn.positions import Positions, earlier, later, positions_of
from jx_neuron.nn.state import State, joined

if TYPE_CHECKING:
    from jx_neuron.checkpoint.weights import Params, Tensors


@dataclass(frozen=True)
class Functions:
    """The functions of a decoder whole on one device, with weights and state stored as they are computed with."""

    decoder: Decoder

    @classmethod
    def of(cls, decoder: Decoder) -> "Functions":
        """Those of a decoder, whatever its tensor-parallel degree and the form of its weights and state."""
        state = [replace(row, dtype=None) if row.is_encoded else row for row in decoder.state]
        return cls(replace(decoder, tp_degree=1, quant=None, state=state))

    @cached_property
    def computed(self) -> dict[str, np.ndarray]:
        """The parameters that follow from the config, which no training changes: ALiBi's slopes."""
        decoder = self.decoder
        return {
            row.target: np.asarray(row.read(decoder.config, cast("Tensors", None)), np.float32)
            for row in decoder.rows
            if row.is_computed
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that is an argument."""
        return {path: shape for path, shape in self.decoder.shapes.items() if path not in self.computed}

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises InputError unless `params` are a model's, in names and shapes."""
        if not isinstance(params, Mapping):
            raise InputError(f"params is a mapping such as model.params, and this is a {type(params).__name__}")
        shapes = self.shapes()
        for path in (*sorted(shapes.keys() - params.keys()), *sorted(params.keys() - shapes.keys(), key=str)):
            what = "lacks" if path in shapes else "has"
            raise InputError(f"params {what} {path!r}; it has the names of model.params and no others")
        for path, shape in shapes.items():
            if jnp.shape(params[path]) != shape:
                raise InputError(
                    f"params[{path!r}] has shape {list(jnp.shape(params[path]))}; the model has {list(shape)}"
                )

    def apply(self, params: Mapping[str, Any], ids: Any, attention_mask: Any = None) -> Array:
        """`Calls.apply`."""
        tokens_bt = self._ids(ids)
        if tokens_bt.ndim == 1:
            mask = None if attention_mask is None else jnp.asarray(attention_mask)[None]
            return self.apply(params, tokens_bt[None], mask)[0]
        b, t = tokens_bt.shape
        self._check_length(t)
        start_b, length_b = jnp.zeros((b,), jnp.int32), jnp.full((b,), t, jnp.int32)
        if attention_mask is None:
            return self._logits(params, tokens_bt, length_b)
        mask_bt = jnp.asarray(attention_mask) != 0
        if mask_bt.shape != (b, t):
            raise InputError(f"attention_mask {list(mask_bt.shape)} must be {[b, t]}: 1 on tokens, 0 on padding")
        start_b = jnp.argmax(mask_bt, axis=1).astype(jnp.int32)
        logits_btv = self._logits(params, earlier(tokens_bt, start_b), jnp.sum(mask_bt, axis=1, dtype=jnp.int32))
        return later(logits_btv, start_b)

    def _logits(self, params: Mapping[str, Any], tokens_bt: Array, length_b: Array) -> Array:
        (b, t), zero_b = tokens_bt.shape, jnp.zeros_like(length_b)
        # with as many positions as tokens, attention reads nothing of the state
        state = self.init_state(b, t, self._dtype(params))
        return self._run(params, state, tokens_bt, positions_of(zero_b, length_b, None, t, t))[0]

    def init_state(self, rows: int, positions: int, dtype: Any) -> State:
        """`Calls.init_state`."""
        state = self.decoder.abstract_state(rows, positions, dtype)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)

    def step(
        self, params: Mapping[str, Any], state: State, ids: Any, start: Any, length: Any = None
    ) -> tuple[Array, State]:
        """`Calls.step`."""
        tokens_bt = self._ids(ids)
        if tokens_bt.ndim != 2:
            raise InputError(f"ids must be [rows, tokens]; this is {list(tokens_bt.shape)}")
        b, t = tokens_bt.shape
        if b != state.slots or t > state.positions:
            raise InputError(f"ids {[b, t]} does not fit a state of {state.slots} rows and {state.positions} positions")
        start_b = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,))
        length_b = jnp.full((b,), t, jnp.int32) if length is None else jnp.asarray(length, jnp.int32)
        at = positions_of(start_b, length_b, None, t, state.positions)
        return self._run(params, state, tokens_bt, at)

    def _run(self, params: Mapping[str, Any], state: State, tokens_bt: Array, at: Positions) -> tuple[Array, State]:
        self.check(params)
        model = self.decoder.bind(cast("Params", dict(sorted({**params, **self.computed}.items()))))
        x_btd, layers = model(tokens_bt, state, at)
        return model.logits(x_btd).astype(jnp.float32), joined(layers)

    def _dtype(self, params: Mapping[str, Any]) -> Any:
        """Of the state: that of the widest kernels, which are not float32 alone for being exact."""
        exact = {row.target for row in self.decoder.rows if row.is_float32}
        dtypes = [jnp.result_type(array) for path, array in params.items() if path not in exact]
        return jnp.result_type(*dtypes) if dtypes else jnp.float32

    def _ids(self, ids: Any) -> Array:
        if type(ids).__module__.partition(".")[0] == "torch":
            ids = ids.numpy()
        tokens = jnp.asarray(ids)
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim not in (1, 2) or not tokens.size:
            raise InputError(
                f"ids must be integers [tokens] or [rows, tokens]; these are {tokens.dtype} {list(tokens.shape)}"
            )
        return tokens.astype(jnp.int32)

    def _check_length(self, tokens: int) -> None:
        limit = self.decoder.config.max_positions
        if limit is not None and tokens > limit:
            raise InputError(f"ids has {tokens} tokens, and the model has {limit} positions; shorten it")
