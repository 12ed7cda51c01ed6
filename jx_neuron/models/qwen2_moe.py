"""Qwen2 with experts, of which one is every token's (Qwen Team, arXiv:2407.10671).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2_moe/modeling_qwen2_moe.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    FULL,
    SLIDING,
    LlamaLikeConfig,
    LlamaLikeModel,
    MaxWindowLayersConfig,
)
from jx_neuron.models.mixture import TRAINING, SharedExpertConfig, qwen_experts
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router, SharedExpert
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(SharedExpertConfig, MaxWindowLayersConfig, LlamaLikeConfig):
    """HF's Qwen2MoeConfig."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 32768
    qkv_bias: bool = True
    sliding_window: int | None = field(default=4096, metadata={"least": 0})
    num_experts: int = 60
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632

    MODEL_TYPE = "qwen2_moe"
    COMPLETE = True
    INERT = TRAINING
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    @property
    def window(self) -> int | None:
        """HF writes 0 for none."""
        return super().window or None

    @property
    def usual_types(self) -> list[str]:
        """Of the layers before `max_window_layers`, every second one has a window."""
        slides = [self.use_sliding_window and i < self.max_window_layers and i % 2 == 0 for i in range(self.layers)]
        return [SLIDING if slide else FULL for slide in slides]


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, sizes, act = cfg.hidden_size, cfg.rms_norm_eps, cfg.sizes_of(layer), cfg.hidden_act
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(sizes, bias=cfg.qkv_bias, out_bias=False, window=cfg.windows[layer], rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        if cfg.has_experts(layer):
            gate = Router(sizes, cfg.chosen, normalize=cfg.norm_topk_prob, rngs=rngs)
            shared = SharedExpert(sizes, act, rngs=rngs)
            self.mlp: nnx.Module = MoE(gate, Experts(sizes, act, rngs=rngs), shared)
        else:
            self.mlp = GatedMLP(sizes, act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", out_bias=False),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    *qwen_experts(LAYER + "mlp", "layers.{i}.mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
