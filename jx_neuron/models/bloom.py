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
from jx_neuron.models.rows import alibi, column_parallel, embedding, grouped_qkv, layer_norm, row_parallel
from jx_neuron.nn.attention import alibi_bias, attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Linear, Linears, through
from jx_neuron.nn.state import LayerState, Positions, State


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

    MODEL_TYPE: ClassVar[str] = "bloom"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # pretraining_tp and slow_but_exact: the same sums, in as many parts
    INERT: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout hidden_dropout pretraining_tp seq_length slow_but_exact unk_token_id".split()
    )
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
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_epsilon)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(n, h), v_proj=(n, h)), bias=True, rngs=rngs)
        self.dense = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, cfg.layer_norm_epsilon)
        self.dense_h_to_4h = Linear((d,), (f,), bias=True, rngs=rngs)
        self.dense_4h_to_h = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT["gelu_pytorch_tanh"]
        self.post_norm_residual = cfg.apply_residual_connection_post_layernorm

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, bias_ns: Array) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        q_btnh, k_btnh, v_btnh = self.qkv(h_btd)
        a_btnh, state = attend(q_btnh, k_btnh, v_btnh, state, at, bias_ns=bias_ns)
        x_btd = (h_btd if self.post_norm_residual else x_btd) + self.dense(a_btnh)
        h_btd = self.post_attention_layernorm(x_btd)
        m_btd = self.dense_4h_to_h(self.act(self.dense_h_to_4h(h_btd)))
        return (h_btd if self.post_norm_residual else x_btd) + m_btd, state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, v = (cfg.sizes[c] for c in "dnv")
        self.word_embeddings = Embedding(v, d, rngs=rngs)
        self.word_embeddings_layernorm = LayerNorm(d, cfg.layer_norm_epsilon)
        self.slopes = nnx.Param(jnp.zeros((n,)))
        self.h = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.ln_f = LayerNorm(d, cfg.layer_norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(v, d, rngs=rngs)

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd = self.word_embeddings_layernorm(self.word_embeddings(tokens_bt))
        x_btd, state = through(self.h, x_btd, state, at, alibi_bias(self.slopes[...], at))
        return self.ln_f(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.word_embeddings if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "transformer.h.{i}.", "h.{i}."
WEIGHTS = (
    embedding("transformer.word_embeddings", "word_embeddings"),
    *layer_norm("transformer.word_embeddings_layernorm", "word_embeddings_layernorm"),
    alibi("slopes"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *grouped_qkv(HF + "self_attention.query_key_value", OURS + "qkv"),
    *row_parallel(HF + "self_attention.dense", OURS + "dense", "n h"),
    *layer_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *column_parallel(HF + "mlp.dense_h_to_4h", OURS + "dense_h_to_4h", "f"),
    *row_parallel(HF + "mlp.dense_4h_to_h", OURS + "dense_4h_to_h", "f"),
    *layer_norm("transformer.ln_f", "ln_f"),
    embedding("lm_head", "lm_head"),
)

# the head where it is tied
IGNORE = (Copy("lm_head.weight", of="transformer.word_embeddings.weight"),)
