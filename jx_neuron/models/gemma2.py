"""Gemma 2 (Gemma Team, arXiv:2408.00118): norms around each sublayer, soft caps, every other layer with a window.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma2/modeling_gemma2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import Copy
from jx_neuron.models.llama_like import LlamaLikeConfig, full_every, layer_types, layer_windows
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, Layers, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Gemma2Config."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_act: str = field(default="gelu_pytorch_tanh", metadata={"hf": "hidden_activation"})
    max_position_embeddings: int = 8192
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    MODEL_TYPE: ClassVar[str] = "gemma2"
    COMPLETE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **LlamaLikeConfig.ONLY,
        "use_bidirectional_attention": (None, False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.windows

    @property
    def types(self) -> list[str]:
        return layer_types(self, self.layer_types, full_every(2, self.layers))

    @property
    def windows(self) -> list[int | None]:
        return layer_windows(self, self.types, self.sliding_window)


class Block(nnx.Module):
    def __init__(self, cfg: Config, window: int | None, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(d, cfg.rms_norm_eps, offset=1) for _ in range(2))
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (
            RMSNorm(d, cfg.rms_norm_eps, offset=1) for _ in range(2)
        )
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act, self.scale = ACT[cfg.hidden_act], cfg.query_pre_attn_scalar**-0.5
        self.window, self.soft_cap = window, cfg.attn_logit_softcapping

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        a_btnh, state = attend(
            rope_half(q_btnh, by),
            rope_half(k_btkh, by),
            v_btkh,
            state,
            at,
            self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        x_btd = x_btd + self.post_attention_layernorm(self.o_proj(a_btnh))
        gate_btf, up_btf = self.gate_up(self.pre_feedforward_layernorm(x_btd))
        return x_btd + self.post_feedforward_layernorm(self.down_proj(self.act(gate_btf) * up_btf)), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, window, rngs) for window in cfg.windows)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.rope, self.scale, self.soft_cap = cfg.rope, cfg.hidden_size**0.5, cfg.final_logit_softcapping

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        by = self.rope(at)
        x_btd = self.embed_tokens(tokens_bt)
        x_btd, state = self.layers(x_btd * jnp.asarray(self.scale, x_btd.dtype), state, at, by)
        return self.norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        logits_btv = (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)
        return logits_btv if self.soft_cap is None else self.soft_cap * jnp.tanh(logits_btv / self.soft_cap)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS),
    rms_norm(HF + "pre_feedforward_layernorm", OURS + "pre_feedforward_layernorm"),
    rms_norm(HF + "post_feedforward_layernorm", OURS + "post_feedforward_layernorm"),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

# inverse frequencies that older checkpoints carry, and the head where it is tied
IGNORE = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", Copy("lm_head.weight", of="model.embed_tokens.weight"))
