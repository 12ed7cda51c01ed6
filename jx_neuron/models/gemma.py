"""Gemma (Gemma Team, arXiv:2403.08295): Llama with wide heads, GELU, norms of 1 + weight and scaled embeddings.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma/modeling_gemma.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's GemmaConfig."""

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    MODEL_TYPE = "gemma"
    COMPLETE = True
    LAYERS_ALIKE = True
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **LlamaLikeConfig.ONLY,
        "hidden_activation": (None, "gelu_pytorch_tanh"),
    }


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps, offset=1)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps, offset=1)
        # "gelu" in older configs means its approximation
        act = "gelu_pytorch_tanh" if cfg.hidden_act == "gelu" else cfg.hidden_act
        self.mlp = GatedMLP(cfg.sizes, act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)
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
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
