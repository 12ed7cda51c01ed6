"""What is around the blocks of every decoder: token embeddings, a last norm, and the head."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.nn.layers import Embedding, Layers
from jx_neuron.nn.state import Positions, State

__all__ = ["CausalLM"]


class _Config(Protocol):
    @property
    def sizes(self) -> dict[str, int]: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class CausalLM(nnx.Module):
    """Token embeddings, blocks, a last norm, and a head that may be tied to the embeddings.

    soft_cap:  logits become cap · tanh(logits / cap), as Gemma 2's (arXiv:2408.00118).
    head_bias: logits have a bias, `lm_head_bias`.
    """

    def __init__(
        self,
        cfg: _Config,
        blocks: Iterable[nnx.Module],
        norm: nnx.Module,
        rngs: nnx.Rngs,
        *,
        soft_cap: float | None = None,
        head_bias: bool = False,
    ):
        d, v = cfg.sizes["d"], cfg.sizes["v"]
        self.embed_tokens = Embedding(v, d, rngs=rngs)
        self.layers = Layers(blocks)
        self.norm: Any = norm
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(v, d, rngs=rngs)
        self.lm_head_bias = nnx.Param(jnp.zeros((v,))) if head_bias else None
        self.soft_cap = soft_cap

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed(tokens_bt, at), state, at, *self.block_args(at))
        return self.norm(x_btd), state

    def tapped(self, tokens_bt: Array, state: State, at: Positions, taps: Sequence[int]) -> tuple[Array, State, Array]:
        """The same, and what enters the layers `taps`, [b, t, i, d]."""
        x_btd = self.embed(tokens_bt, at)
        x_btd, state, entering = self.layers.tapped(taps, x_btd, state, at, *self.block_args(at))
        return self.norm(x_btd), state, jnp.stack(entering, axis=2)

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        """What enters the first block, [b, t, d]."""
        return self.embed_tokens(tokens_bt)

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        """What every block takes besides x_btd, its layer's state and `at`."""
        return ()

    def logits(self, x_btd: Array) -> Array:
        """Logits [b, t, v] of hidden states."""
        logits_btv = (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)
        if self.lm_head_bias is not None:
            logits_btv += self.lm_head_bias[...]
        return logits_btv if self.soft_cap is None else self.soft_cap * jnp.tanh(logits_btv / self.soft_cap)
