"""Falcon (Almazrouei et al., arXiv:2311.16867).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/falcon/modeling_falcon.py
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import alibi, column_parallel, embedding, grouped_qkv, layer_norm, row_parallel
from jx_neuron.nn.attention import alibi_bias, attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Linear, Linears, through
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(RopeConfig):
    """HF's FalconConfig."""

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float = 1e-5
    num_kv_heads: int | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    tie_word_embeddings: bool = True

    MODEL_TYPE: ClassVar[str] = "falcon"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {"n_embed": "hidden_size"}
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "hidden_dropout"})
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[Mapping[str, Any]] = {"apply_residual_connection_post_layernorm": False}

    def __post_init__(self) -> None:
        one_of("falcon", "activation", self.activation, ACT)
        n, k, new = self.num_attention_heads, self.sizes["k"], self.new_decoder_architecture
        divisible("falcon", "hidden_size", self.hidden_size, "num_attention_heads", n)
        divisible("falcon", "num_attention_heads", n, "num_kv_heads", k)
        norms = self.num_ln_in_parallel_attn
        legal = norms != 2 and k == (1 if self.multi_query else n)
        if not (self.parallel_attn if new else legal) or norms not in (None, 1, 2):
            raise ConfigError(
                f"falcon: num_ln_in_parallel_attn={norms} and num_kv_heads={k} are not supported here; legal are, with "
                f"new_decoder_architecture and parallel_attn, null, 1 or 2, and otherwise null or 1, with {n} heads"
            )
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k = 1 if self.multi_query and not self.new_decoder_architecture else self.num_kv_heads or n
        f = 4 * d if self.ffn_hidden_size is None else self.ffn_hidden_size
        return dict(d=d, n=n, k=k, h=d // n, f=f, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.two_norms = cfg.new_decoder_architecture and cfg.num_ln_in_parallel_attn != 1
        self.parallel = cfg.parallel_attn
        if self.two_norms:
            self.ln_attn = LayerNorm(d, cfg.layer_norm_epsilon)
            self.ln_mlp = LayerNorm(d, cfg.layer_norm_epsilon)
        else:
            self.input_layernorm = LayerNorm(d, cfg.layer_norm_epsilon)
        if not self.parallel:
            self.post_attention_layernorm = LayerNorm(d, cfg.layer_norm_epsilon)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h)), bias=cfg.bias, rngs=rngs)
        self.dense = Linear((n, h), (d,), bias=cfg.bias, rngs=rngs)
        self.dense_h_to_4h = Linear((d,), (f,), bias=cfg.bias, rngs=rngs)
        self.dense_4h_to_h = Linear((f,), (d,), bias=cfg.bias, rngs=rngs)
        self.act = ACT[cfg.activation]

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Rotation | None, bias_ns: Array | None
    ) -> tuple[Array, LayerState]:
        h_btd = self.ln_attn(x_btd) if self.two_norms else self.input_layernorm(x_btd)
        q_btnh, k_btkh, v_btkh = self.qkv(h_btd)
        if by is not None:
            q_btnh, k_btkh = rope_half(q_btnh, by), rope_half(k_btkh, by)
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, bias_ns=bias_ns)
        y_btd = x_btd + self.dense(a_btnh)
        if self.two_norms:
            h_btd = self.ln_mlp(x_btd)
        elif not self.parallel:
            h_btd = self.post_attention_layernorm(y_btd)
        return y_btd + self.dense_4h_to_h(self.act(self.dense_h_to_4h(h_btd))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, v = (cfg.sizes[c] for c in "dnv")
        self.word_embeddings = Embedding(v, d, rngs=rngs)
        self.slopes = nnx.Param(jnp.zeros((n,))) if cfg.alibi else None
        self.h = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.ln_f = LayerNorm(d, cfg.layer_norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(v, d, rngs=rngs)
        self.rope, self.scale = cfg.rope, 1 / math.sqrt(cfg.sizes["h"])

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        positions: tuple[Rotation | None, Array | None]
        if self.slopes is None:
            positions = self.rope(at), None
        else:  # HF rounds the bias to bfloat16, and multiplies it by the scale of scores
            positions = None, alibi_bias(self.slopes[...], at, jnp.bfloat16).astype(jnp.float32) * self.scale
        x_btd, state = through(self.h, self.word_embeddings(tokens_bt), state, at, *positions)
        return self.ln_f(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.word_embeddings if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "transformer.h.{i}.", "h.{i}."
NORMS = ("ln_attn", "ln_mlp", "input_layernorm", "post_attention_layernorm")
WEIGHTS = (
    embedding("transformer.word_embeddings", "word_embeddings"),
    alibi("slopes"),
    *(row for name in NORMS for row in layer_norm(HF + name, OURS + name)),
    *grouped_qkv(HF + "self_attention.query_key_value", OURS + "qkv"),
    *row_parallel(HF + "self_attention.dense", OURS + "dense", "n h"),
    *column_parallel(HF + "mlp.dense_h_to_4h", OURS + "dense_h_to_4h", "f"),
    *row_parallel(HF + "mlp.dense_4h_to_h", OURS + "dense_4h_to_h", "f"),
    *layer_norm("transformer.ln_f", "ln_f"),
    embedding("lm_head", "lm_head"),
)

INV_FREQ = r"h\.\d+\.self_attention\.(maybe_)?rotary(_emb)?\.inv_freq"  # older checkpoints carry it
IGNORE = (INV_FREQ, Copy("lm_head.weight", of="transformer.word_embeddings.weight"))
