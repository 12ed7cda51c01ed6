"""The step of an EAGLE-3 head: it computes a sequence as far as the target has, then draws tokens one after another."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jx_neuron.checkpoint.weights import Params
from jx_neuron.models import Decoder
from jx_neuron.nn.positions import positions_of
from jx_neuron.nn.sampling import greedy
from jx_neuron.nn.state import State, joined
from jx_neuron.step.program_key import ProgramKey


def draft(decoder: Decoder, key: ProgramKey) -> Callable[..., tuple[Array, Array, State]]:
    """The program of `key`, to be jitted.

    It takes (params, state, tokens_bt, start_b, length_b, features_bte). Row b is slot b, of which positions start_b,
    start_b + 1, … are computed from the target's features there and the tokens that follow. length_b counts them; the
    rest is padding, and a row of length 0 leaves its slot unchanged.

    It returns (tokens [b, g] int32, logits [b, g, v] float32, state): the `key.guesses` likeliest tokens behind, of the
    target's vocabulary, each computed from the one before it and from the head's own hidden state in place of a
    feature; and the logits that they are of, over the head's vocabulary.
    """

    def run(
        params: Params, state: State, tokens_bt: Array, start_b: Array, length_b: Array, features_bte: Array
    ) -> tuple[Array, Array, State]:
        model: Any = decoder.bind(params)
        at = positions_of(start_b, length_b, None, key.tokens, key.positions)
        x_btd, state = model(tokens_bt, model.fused(features_bte), state, at)
        last_b = jnp.clip(length_b - 1, 0, key.tokens - 1)
        x_b1d = jnp.take_along_axis(x_btd, last_b[:, None, None], axis=1, mode="clip")
        one_b = jnp.minimum(length_b, 1)
        tokens, logits = list[Array](), list[Array]()
        for guess in range(key.guesses):
            if guess:
                at = positions_of(start_b + length_b + (guess - 1), one_b, None, 1, key.positions)
                x_b1d, state = model(tokens[-1][:, None], x_b1d, state, at)
            logits.append(logits_of(decoder, model, x_b1d)[:, 0])
            tokens.append(model.of_target(greedy(logits[-1], decoder.tp_degree)))
        return jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1), joined(state)

    return run


def logits_of(decoder: Decoder, model: Any, x_btd: Array) -> Array:
    """The logits of hidden states, float32 [b, t, v]; those of padding are the least float32."""
    logits_btv = model.logits(x_btd).astype(jnp.float32)
    if logits_btv.shape[-1] == (v := decoder.config.sizes["v"]):
        return logits_btv
    return jnp.where(jnp.arange(logits_btv.shape[-1]) < v, logits_btv, jnp.finfo(jnp.float32).min)
