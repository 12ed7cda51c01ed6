"""Granite 3 with experts (IBM, 2024): scales on embeddings, attention, residuals and logits (arXiv:2203.03466).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/granitemoe/modeling_granitemoe.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, granite_experts
from jx_neuron.models.rows import attention, embedding, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention


@dataclass(frozen=True)
class Config(ExpertsConfig, LlamaLikeConfig):
    """HF's GraniteMoeConfig."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    attention_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    MODEL_TYPE = "granitemoe"
    COMPLETE = True
    LAYERS_ALIKE = True
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    INERT = TRAINING


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, scale=cfg.attention_multiplier, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        gate = Router(cfg.sizes, cfg.chosen, after=True, rngs=rngs)
        self.mlp = MoE(gate, Experts(cfg.sizes, cfg.hidden_act, rngs=rngs))
        self.residual_multiplier = cfg.residual_multiplier

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd * self.residual_multiplier
        m_btd = self.mlp(self.post_attention_layernorm(x_btd))
        return x_btd + m_btd * self.residual_multiplier, state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)
        self.embedding_multiplier, self.logits_scaling = cfg.embedding_multiplier, cfg.logits_scaling

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return super().embed(tokens_bt, at) * self.embedding_multiplier

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) / self.logits_scaling


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *granite_experts(LAYER + "block_sparse_moe", "layers.{i}.mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
