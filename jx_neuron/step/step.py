"""The step: one pure function on fixed shapes, for prefill, decoding, verifying drafts, and scores."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jx_neuron.checkpoint.weights import Params
from jx_neuron.models import Decoder
from jx_neuron.nn.ops import ops
from jx_neuron.nn.sampling import Sampling, greedy
from jx_neuron.nn.state import State, joined, positions_of
from jx_neuron.step.draft import draft, logits_of
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import DRAWN_LAST


def inputs(decoder: Decoder, key: ProgramKey, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each input of `step` by name, in order, without parameters and state.

    dtype: that of the model.
    """
    layouts: dict[str, tuple[tuple[int, ...], Any]] = {**key.inputs(adapters=decoder.adapters is not None)}
    if key.kind == "draft":
        layouts["features_bte"] = (key.rows, key.tokens, decoder.config.sizes["e"]), dtype
    return layouts


def step(decoder: Decoder, key: ProgramKey) -> Callable[..., tuple[Any, ...]]:
    """The program of `key`, to be jitted; of a "draft" that of `jx_neuron.step.draft`.

    It takes (params, state, tokens_bt, [slot_b,] start_b, length_b[, adapter_b][, temperature_b, top_k_b, top_p_b,
    uniform_b]). The tokens of row b have positions start_b, start_b + 1, … in slot slot_b (in slot b to decode and to
    verify). length_b counts the tokens of the sequence from start_b on; it may exceed t where a prompt is computed in
    chunks. Tokens from length_b on are padding, and a row of length 0 leaves its slot unchanged. adapter_b, of models
    that have adapters, is the number of each row's, 0 for none.

    It returns (next tokens [b, 1] int32, logits float32 [b, v], or [b, t, v] for scores, state). Next tokens and logits
    [b, v] are those of each row's last real token. To verify, it takes uniform_bt, and returns the next token of every
    token, [b, t], and logits [b, t, v]. Where `state.goes_back`, a start_b of -1 - n has a row begin at position n as
    the last step that verified a draft in its slot began there, whatever recurrent layers keep since. v is padded to a
    multiple of the tensor-parallel degree, with the least float32 as logits of the padding.

    With `key.taps`, what enters those layers [b, t, i, d] comes before the state.
    """
    if key.kind == "draft":
        return draft(decoder, key)

    def run(params: Params, state: State, tokens_bt: Array, *inputs: Array) -> tuple[Any, ...]:
        slot_b, (start_b, length_b, *others) = (None, inputs) if key.in_place else (inputs[0], inputs[1:])
        adapter_b, sampling = (None, others) if decoder.adapters is None else (others[0], others[1:])
        if slot_b is None:
            tokens_bt = jnp.where(tokens_bt == DRAWN_LAST, state.token_z[: key.rows, None], tokens_bt)
        model: Any = decoder.bind(params, adapter_b)
        again_b = None
        if key.kind == "verify" and state.goes_back:
            again_b = start_b < 0
            start_b = jnp.where(again_b, -1 - start_b, start_b)
        at = positions_of(start_b, length_b, slot_b, key.tokens, key.positions, again_b)
        outputs = model.tapped(tokens_bt, state, at, key.taps) if key.taps else model(tokens_bt, state, at)
        x_btd, layers, *features = outputs
        state = joined(layers)
        last_b = jnp.clip(length_b - 1, 0, key.tokens - 1)
        if not key.gives_every and key.tokens > 1:
            x_btd = jnp.take_along_axis(x_btd, last_b[:, None, None], axis=1, mode="clip")
        logits_btv = logits_of(decoder, model, x_btd)
        drawn_btv = logits_btv
        if key.kind == "score":
            drawn_btv = jnp.take_along_axis(logits_btv, last_b[:, None, None], axis=1, mode="clip")
        logits_mv = drawn_btv.reshape(-1, drawn_btv.shape[-1])
        if key.candidates == 1:
            token_m = greedy(logits_mv, decoder.tp_degree)
        else:
            of_each = (x if x.ndim == 2 else jnp.broadcast_to(x[:, None], key.drawn) for x in sampling)
            by = Sampling(*(x.reshape(-1) for x in of_each))
            token_m = ops().sample(logits_mv, by, key.candidates, decoder.tp_degree)
        token_bt = token_m.reshape(key.drawn)
        token_b = token_bt[:, 0]
        if key.kind == "verify":
            token_b = jnp.take_along_axis(token_bt, last_b[:, None], axis=1, mode="clip")[:, 0]
        if slot_b is None:
            drawn_b = jnp.where(length_b > 0, token_b, state.token_z[: key.rows])
            token_z = state.token_z.at[: key.rows].set(drawn_b)
        else:
            token_z = state.token_z.at[slot_b].set(jnp.where(length_b > 0, token_b, state.token_z[slot_b]))
        state = dataclasses.replace(state, token_z=token_z)
        return token_bt, logits_btv if key.gives_every else logits_btv[:, 0], *features, state

    return run
