"""Gemma 3, its text model (Gemma Team, arXiv:2503.19786): q/k norms, windows in five of six layers, RoPE of two bases.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    LlamaLikeConfig,
    LlamaLikeModel,
    full_every,
    layer_types,
    layer_windows,
)
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Gemma3TextConfig."""

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_act: str = field(default="gelu_pytorch_tanh", metadata={"hf": "hidden_activation"})
    max_position_embeddings: int = 131072
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 6
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = None
    rope_theta: float = 1000000.0
    rope_local_base_freq: float = 10000.0

    MODEL_TYPE: ClassVar[str] = "gemma3_text"
    COMPLETE: ClassVar[bool] = True
    ROPE_BY_TYPE: ClassVar[bool] = True
    # attn_logit_softcapping: HF's attention of Gemma 3 leaves it out
    INERT: ClassVar[frozenset[str]] = frozenset(
        "_sliding_window_pattern attention_dropout attn_logit_softcapping".split()
    )

    @property
    def types(self) -> list[str]:
        return layer_types(self, self.layer_types, full_every(self.sliding_window_pattern, self.layers))

    @property
    def windows(self) -> list[int | None]:
        return layer_windows(self, self.types, self.sliding_window)

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        return self.rope_by_type(self.rope_local_base_freq)


class Block(nnx.Module):
    def __init__(self, cfg: Config, kind: str, window: int | None, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        norms = (RMSNorm(d, cfg.rms_norm_eps, offset=1) for _ in range(4))
        self.input_layernorm, self.post_attention_layernorm, *feedforward = norms
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = feedforward
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(h, cfg.rms_norm_eps, offset=1) for _ in "qk")
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act, self.scale = ACT[cfg.hidden_act], cfg.query_pre_attn_scalar**-0.5
        self.window, self.type = window, kind

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, rotations: dict[str, Rotation]
    ) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        by = rotations[self.type]
        q_btnh, k_btkh = rope_half(self.q_norm(q_btnh), by), rope_half(self.k_norm(k_btkh), by)
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, self.scale, window=self.window)
        x_btd = x_btd + self.post_attention_layernorm(self.o_proj(a_btnh))
        gate_btf, up_btf = self.gate_up(self.pre_feedforward_layernorm(x_btd))
        return x_btd + self.post_feedforward_layernorm(self.down_proj(self.act(gate_btf) * up_btf)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        kinds = zip(cfg.types, cfg.windows, strict=True)
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        super().__init__(
            cfg, (Block(cfg, kind, window, rngs) for kind, window in kinds), rngs, norm=norm, rope=cfg.ropes
        )
        self.scale, self.soft_cap = cfg.hidden_size**0.5, cfg.final_logit_softcapping

    def embed(self, tokens_bt: Array) -> Array:
        x_btd = super().embed(tokens_bt)
        return x_btd * jnp.asarray(self.scale, x_btd.dtype)

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return ({kind: rope(at) for kind, rope in self.rope.items()},)

    def logits(self, x_btd: Array) -> Array:
        logits_btv = super().logits(x_btd)
        return logits_btv if self.soft_cap is None else self.soft_cap * jnp.tanh(logits_btv / self.soft_cap)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS),
    rms_norm(HF + "self_attn.q_norm", OURS + "q_norm", "h"),
    rms_norm(HF + "self_attn.k_norm", OURS + "k_norm", "h"),
    rms_norm(HF + "pre_feedforward_layernorm", OURS + "pre_feedforward_layernorm"),
    rms_norm(HF + "post_feedforward_layernorm", OURS + "post_feedforward_layernorm"),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
