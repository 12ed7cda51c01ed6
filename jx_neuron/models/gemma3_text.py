"""Gemma 3, its text model (Gemma Team, arXiv:2503.19786): q/k norms, windows in five of six layers, RoPE of two bases.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LayerTypesConfig, LlamaLikeConfig, LlamaLikeModel, full_every
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(LayerTypesConfig, LlamaLikeConfig):
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
    final_logit_softcapping: float | None = None
    rope_theta: float = 1000000.0
    rope_local_base_freq: float = 10000.0

    MODEL_TYPE = "gemma3_text"
    COMPLETE = True
    ROPE_BY_TYPE = True
    # attn_logit_softcapping: HF's attention of Gemma 3 leaves it out
    INERT = frozenset({"_sliding_window_pattern", "attn_logit_softcapping"})

    @property
    def usual_types(self) -> list[str]:
        return full_every(self.sliding_window_pattern, self.layers)

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        return self.rope_by_type(self.rope_local_base_freq)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        self.type = cfg.types[layer]
        self.input_layernorm = RMSNorm(d, eps, offset=1)
        self.self_attn = Attention(
            cfg.sizes,
            bias=cfg.attention_bias,
            q_norm=RMSNorm(h, eps, offset=1),
            k_norm=RMSNorm(h, eps, offset=1),
            scale=cfg.query_pre_attn_scalar**-0.5,
            window=cfg.windows[layer],
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(d, eps, offset=1)
        self.pre_feedforward_layernorm = RMSNorm(d, eps, offset=1)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, eps, offset=1)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, rotations: dict[str, Rotation]
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, rotations[self.type])
        x_btd = x_btd + self.post_attention_layernorm(a_btd)
        m_btd = self.mlp(self.pre_feedforward_layernorm(x_btd))
        return x_btd + self.post_feedforward_layernorm(m_btd), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        blocks = (Block(cfg, layer, rngs) for layer in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, norm=norm, rope=cfg.ropes, soft_cap=cfg.final_logit_softcapping)
        self.scale = cfg.hidden_size**0.5

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        x_btd = super().embed(tokens_bt, at)
        return x_btd * jnp.asarray(self.scale, x_btd.dtype)

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return ({kind: rope(at) for kind, rope in self.rope.items()},)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "self_attn.q_norm", width="h"),
    rms_norm(LAYER + "self_attn.k_norm", width="h"),
    rms_norm(LAYER + "post_attention_layernorm"),
    rms_norm(LAYER + "pre_feedforward_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm(LAYER + "post_feedforward_layernorm"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
