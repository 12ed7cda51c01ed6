"""Qwen3 with experts (Qwen Team, arXiv:2505.09388).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel, SlidingWindowConfig
from jx_neuron.models.mixture import TRAINING, SparseStepConfig, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(SparseStepConfig, SlidingWindowConfig, LlamaLikeConfig):
    """HF's Qwen3MoeConfig."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768

    MODEL_TYPE = "qwen3_moe"
    COMPLETE = True
    INERT = TRAINING | {"max_window_layers"}
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, h, eps, sizes = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps, cfg.sizes
        q_norm, k_norm = RMSNorm(h, eps), RMSNorm(h, eps)
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(
            sizes, bias=cfg.attention_bias, q_norm=q_norm, k_norm=k_norm, window=cfg.window, rngs=rngs
        )
        self.post_attention_layernorm = RMSNorm(d, eps)
        if cfg.has_experts(layer):
            gate = Router(sizes, cfg.chosen, normalize=cfg.norm_topk_prob, rngs=rngs)
            self.mlp: nnx.Module = MoE(gate, Experts(sizes, cfg.hidden_act, rngs=rngs))
        else:
            self.mlp = GatedMLP(sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "self_attn.q_norm", width="h"),
    rms_norm(LAYER + "self_attn.k_norm", width="h"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    router(LAYER + "mlp.gate", MLP + "gate"),
    *experts(LAYER + "mlp.experts", MLP + "experts"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
