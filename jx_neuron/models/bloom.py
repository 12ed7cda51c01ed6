"""BLOOM (BigScience Workshop, arXiv:2211.05100).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/bloom/modeling_bloom.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import HFConfig, divisible
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.rows import alibi, attention, embedding, layer_norm, mlp
from jx_neuron.nn.attention import alibi_bias
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's BloomConfig."""

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    tie_word_embeddings: bool = True

    MODEL_TYPE = "bloom"
    COMPLETE = True
    LAYERS_ALIKE = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # pretraining_tp and slow_but_exact: the same sums, in as many parts
    INERT = frozenset("pretraining_tp seq_length slow_but_exact unk_token_id".split())
    USUAL: ClassVar[Mapping[str, Any]] = {
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "offset_alibi": 100,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
    }

    def __post_init__(self) -> None:
        divisible("bloom", "hidden_size", self.hidden_size, "n_head", self.n_head)

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.n_head
        return dict(d=d, n=n, k=n, h=d // n, f=4 * d, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.layer_norm_epsilon
        self.input_layernorm = LayerNorm(d, eps)
        self.self_attention = Attention(cfg.sizes, bias=True, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, eps)
        self.mlp = MLP(cfg.sizes, "gelu_pytorch_tanh", bias=True, rngs=rngs)
        self.post_norm_residual = cfg.apply_residual_connection_post_layernorm

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, bias_ns: Array) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        a_btd, state = self.self_attention(h_btd, state, at, bias_ns=bias_ns)
        x_btd = (h_btd if self.post_norm_residual else x_btd) + a_btd
        h_btd = self.post_attention_layernorm(x_btd)
        return (h_btd if self.post_norm_residual else x_btd) + self.mlp(h_btd), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), norm, rngs)
        self.word_embeddings_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.slopes = nnx.Param(jnp.zeros((cfg.sizes["n"],)))

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return self.word_embeddings_layernorm(super().embed(tokens_bt, at))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return (alibi_bias(self.slopes[...], at),)


LAYER = "transformer.h.{i}."
WEIGHTS = (
    embedding("transformer.word_embeddings", "embed_tokens"),
    *layer_norm("transformer.word_embeddings_layernorm"),
    alibi("slopes"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attention", grouped="query_key_value", out="dense"),
    *layer_norm(LAYER + "post_attention_layernorm"),
    *mlp(LAYER + "mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
)

# the head where it is tied
IGNORE = (Copy("lm_head.weight", of="transformer.word_embeddings.weight"),)
