"""The step: one pure function on fixed shapes, for prefill, decode, and checking a draft."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jx_neuron.checkpoint.weights import Params
from jx_neuron.models import Decoder
from jx_neuron.nn.cache import Cache
from jx_neuron.nn.layers import span
from jx_neuron.nn.sampling import Sampling, greedy, sample
from jx_neuron.step.shape import Shape


def step(decoder: Decoder, shape: Shape) -> Callable[..., tuple[Array, Array, Cache]]:
    """The program of `shape`, to be jitted.

    It takes (params, cache, tokens_bt, start_b, length_b[, temperature_b, top_k_b, top_p_b, uniform_b]): row b's
    tokens stand at positions start_b on, and length_b counts the tokens of its sequence from there, which may exceed t
    where a prompt goes through in chunks; tokens from length_b on are padding. It gives (next tokens [b, 1] int32,
    logits float32 [b, v], or [b, t, v] where all are asked, cache): both are of each row's last valid token. v is
    padded to the tensor-parallel degree, with the least float32 for the logits of padding.
    """

    def run(
        params: Params, cache: Cache, tokens_bt: Array, start_b: Array, length_b: Array, *sampling: Array
    ) -> tuple[Array, Array, Cache]:
        model = decoder.bind(params)
        x_btd, cache = model(tokens_bt, cache, span(start_b, length_b, shape.tokens, shape.slots))
        last_b = jnp.clip(length_b - 1, 0, shape.tokens - 1)
        if not shape.all_logits and shape.tokens > 1:
            x_btd = jnp.take_along_axis(x_btd, last_b[:, None, None], axis=1, mode="clip")
        logits_btv = model.logits(x_btd).astype(jnp.float32)
        if logits_btv.shape[-1] != (v := decoder.config.sizes["v"]):
            logits_btv = jnp.where(jnp.arange(logits_btv.shape[-1]) < v, logits_btv, jnp.finfo(jnp.float32).min)
        if shape.all_logits:
            logits_bv = jnp.take_along_axis(logits_btv, last_b[:, None, None], axis=1, mode="clip")[:, 0]
        else:
            logits_bv = logits_btv[:, 0]
        if shape.candidates == 1:
            token_b = greedy(logits_bv, decoder.tp_degree)
        else:
            token_b = sample(logits_bv, Sampling(*sampling), shape.candidates, decoder.tp_degree)
        return token_b[:, None], logits_btv if shape.all_logits else logits_bv, cache

    return run
