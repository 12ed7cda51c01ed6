"""A model's functions and parameters, for gradients and training."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jx_neuron.errors import ConfigError, InputError
from jx_neuron.llm.origin import DecoderOrigin

if TYPE_CHECKING:
    from jax import Array

    from jx_neuron.artifact.settings import Settings
    from jx_neuron.llm.functions import Functions
    from jx_neuron.llm.origin import Origin
    from jx_neuron.nn.state import State


class Trainable:
    """The functions for training. `NeuronAutoModelForCausalLM` inherits them."""

    settings: "Settings"
    _origin: "Origin"
    _params: "dict[str, Array] | None" = None
    _functions: "Functions | None" = None

    def _make_of(self, origin: "Origin") -> None:
        raise NotImplementedError

    @property
    def params(self) -> "dict[str, Array]":
        """The parameters by dotted path, a pytree of jax arrays, whole and in the dtype of the model.

        Each is a tensor of HF's, or a part of one, in the layout of this package's weight table. They are read once.
        Assigning parameters of the same names and shapes makes the model answer, and `save_pretrained` write, with
        them. A jitted function may donate them: they are then read again.

        Raises ConfigError where the model was loaded with `quant`, and ArtifactError for a model that `save` wrote.
        """
        import jax.numpy as jnp

        if self._params is None or any(array.is_deleted() for array in self._params.values()):
            functions, source = self._pure(), self._origin.whole()
            self._params = {path: jnp.asarray(source.read(path)) for path in sorted(functions.shapes())}
        return dict(self._params)

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        import jax.numpy as jnp

        functions = self._pure()
        functions.check(params)
        for path, array in params.items():
            if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
                raise InputError(f"params[{path!r}] is {jnp.result_type(array)}; parameters are floating-point numbers")
        self._make_of(self._origin.with_params({**params, **functions.computed}))
        self._params = None

    def apply(self, params: Mapping[str, Any], ids: Any, attention_mask: Any = None) -> "Array":
        """Logits of every token: a pure function, for jax.jit, jax.grad and jax.vmap. It has no cache.

        params:         of the names and shapes of `model.params`; it computes in their dtype.
        ids:            [b, t] or [t] integers.
        attention_mask: of the shape of ids, 1 on tokens and 0 on padding, which may be on the left and on the right of
                        a row's tokens. Positions are counted from a row's first token. None for no padding.

        Returns float32 logits [b, t, v], or [t, v]; those of padding have no meaning. Raises InputError for other names
        or shapes, and ConfigError or ArtifactError as `params` does.
        """
        return self._pure().apply(params, ids, attention_mask)

    def init_state(self, rows: int, positions: int, dtype: Any = None) -> "State":
        """An empty state for `step`: what layers keep of `rows` sequences of up to `positions` tokens. `dtype` is the
        model's by default."""
        return self._pure().init_state(rows, positions, self.settings.dtype if dtype is None else dtype)

    def step(
        self, params: Mapping[str, Any], state: "State", ids: Any, start: Any, length: Any = None
    ) -> "tuple[Array, State]":
        """Logits of further tokens, and the state with them: a pure function, for jax.jit.

        params: as `apply` takes them.
        state:  that of `init_state`, or of the step before. Its rows are those of ids.
        ids:    [b, t] integers, which follow each other.
        start:  position of the first of them in its sequence, one integer or [b]; start + t is at most `positions`.
        length: how many of the t tokens are real, [b]; the others are padding on the right. None for all. A row of 0
                leaves its state as it is.

        Returns float32 logits [b, t, v] and the state. Raises as `apply` does.
        """
        return self._pure().step(params, state, ids, start, length)

    def _pure(self) -> "Functions":
        if self._functions is None:
            from jx_neuron.llm.functions import Functions

            if self.settings.quant is not None:
                raise ConfigError(
                    "this model was loaded with quant, and its weights have no gradient; load it without quant"
                )
            if not isinstance(self._origin, DecoderOrigin):
                self._origin.whole()  # raises
                raise AssertionError
            self._functions = Functions.of(self._origin.decoder)
        return self._functions
