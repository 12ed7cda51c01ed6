"""OLMo 3 (OLMo Team, arXiv:2512.13961): OLMo 2 with windows in three of four layers, and RoPE by layer type.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/olmo3/modeling_olmo3.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LayerTypesConfig, LlamaLikeConfig, LlamaLikeModel, full_every
from jx_neuron.models.rows import attention, embedding, gated_mlp, heads_rms_norm, key_head_numbers, rms_norm
from jx_neuron.nn.layers import HeadsRMSNorm, RMSNorm, head_copies
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import GatedMLP, HeadsNormAttention


@dataclass(frozen=True)
class Config(LayerTypesConfig, LlamaLikeConfig):
    """HF's Olmo3Config."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    sliding_window: int | None = 4096

    MODEL_TYPE = "olmo3"
    COMPLETE = True
    ROPE_BY_TYPE = True

    @property
    def usual_types(self) -> list[str]:
        return full_every(4, self.layers)

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        return self.rope_by_type(sliding_theta=500000.0)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, n, k, h = (cfg.sizes[c] for c in "dnkh")
        eps = cfg.rms_norm_eps
        self.type = cfg.types[layer]
        self.self_attn = HeadsNormAttention(
            cfg.sizes,
            bias=cfg.attention_bias,
            q_norm=HeadsRMSNorm(n, h, eps),
            k_norm=HeadsRMSNorm(k, h, eps),
            window=cfg.windows[layer],
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, rotations: dict[str, Rotation], copies_k: Array
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(x_btd, state, at, (rotations[self.type], copies_k))
        x_btd = x_btd + self.post_attention_layernorm(a_btd)
        return x_btd + self.post_feedforward_layernorm(self.mlp(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, rope=cfg.ropes)
        self.number_k = nnx.Param(jnp.zeros((cfg.sizes["k"],)))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return {kind: rope(at) for kind, rope in self.rope.items()}, head_copies(self.number_k[...])


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    key_head_numbers("number_k"),
    *attention(LAYER + "self_attn"),
    heads_rms_norm(LAYER + "self_attn.q_norm", heads="n"),
    heads_rms_norm(LAYER + "self_attn.k_norm", heads="k"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm(LAYER + "post_feedforward_layernorm"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
