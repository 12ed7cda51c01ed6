"""nanochat (Karpathy, 2025, https://github.com/karpathy/nanochat): norms without parameters, q/k norms after RoPE.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/nanochat/modeling_nanochat.py
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, mlp
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, NormAfterRopeAttention


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's NanoChatConfig."""

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 8192
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "relu2"
    attention_bias: bool = False
    final_logit_softcapping: float | None = 15.0

    MODEL_TYPE = "nanochat"
    COMPLETE = True
    LAYERS_ALIKE = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.norm = norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, affine=False)
        self.self_attn = NormAfterRopeAttention(cfg.sizes, bias=cfg.attention_bias, q_norm=norm, k_norm=norm, rngs=rngs)
        self.mlp = MLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.norm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.norm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, affine=False)
        blocks = (Block(cfg, rngs) for _ in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, norm=norm, soft_cap=cfg.final_logit_softcapping)

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return self.norm(super().embed(tokens_bt, at))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        cos_btr, sin_btr = self.rope(at)
        return (Rotation(cos_btr, -sin_btr),)  # the other way round than Llama


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *attention(LAYER + "self_attn"),
    *mlp(LAYER + "mlp", up="fc1", down="fc2", bias=False),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
