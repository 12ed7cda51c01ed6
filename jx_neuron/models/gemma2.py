"""Gemma 2 (Gemma Team, arXiv:2408.00118): norms around each sublayer, soft caps, every other layer with a window.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma2/modeling_gemma2.py
"""

from dataclasses import dataclass, field

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
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    MODEL_TYPE = "gemma2"
    COMPLETE = True

    @property
    def usual_types(self) -> list[str]:
        return full_every(2, self.layers)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps, offset=1)
        self.self_attn = Attention(
            cfg.sizes,
            bias=cfg.attention_bias,
            scale=cfg.query_pre_attn_scalar**-0.5,
            window=cfg.windows[layer],
            soft_cap=cfg.attn_logit_softcapping,
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(d, eps, offset=1)
        self.pre_feedforward_layernorm = RMSNorm(d, eps, offset=1)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, eps, offset=1)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + self.post_attention_layernorm(a_btd)
        m_btd = self.mlp(self.pre_feedforward_layernorm(x_btd))
        return x_btd + self.post_feedforward_layernorm(m_btd), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        blocks = (Block(cfg, layer, rngs) for layer in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, norm=norm, soft_cap=cfg.final_logit_softcapping)
        self.scale = cfg.hidden_size**0.5

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        x_btd = super().embed(tokens_bt, at)
        return x_btd * jnp.asarray(self.scale, x_btd.dtype)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "post_attention_layernorm"),
    rms_norm(LAYER + "pre_feedforward_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm(LAYER + "post_feedforward_layernorm"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
