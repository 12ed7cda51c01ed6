"""OLMoE (Muennighoff et al., arXiv:2409.02060): 64 small experts, and norms of whole queries and keys.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/olmoe/modeling_olmoe.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, HeadsNormModel, LlamaLikeConfig
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, heads_rms_norm, key_head_numbers, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import HeadsRMSNorm, RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import HeadsNormAttention


@dataclass(frozen=True)
class Config(ExpertsConfig, LlamaLikeConfig):
    """HF's OlmoeConfig."""

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    clip_qkv: float | None = None
    rms_norm_eps: float = 1e-5
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False

    MODEL_TYPE = "olmoe"
    COMPLETE = True
    LAYERS_ALIKE = True
    HEADS_FILL_WIDTH = True
    EXPERTS = ("num_experts", "num_experts_per_tok", "intermediate_size")
    INERT = TRAINING
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h = (cfg.sizes[c] for c in "dnkh")
        eps, bias = cfg.rms_norm_eps, cfg.attention_bias
        norms: dict[str, Any] = dict(q_norm=HeadsRMSNorm(n, h, eps), k_norm=HeadsRMSNorm(k, h, eps))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn = HeadsNormAttention(cfg.sizes, bias=bias, clip=cfg.clip_qkv, **norms, rngs=rngs)
        gate = Router(cfg.sizes, cfg.chosen, normalize=cfg.norm_topk_prob, rngs=rngs)
        self.mlp = MoE(gate, Experts(cfg.sizes, cfg.hidden_act, rngs=rngs))

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: tuple[Rotation, Array]
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(HeadsNormModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
WEIGHTS = (
    embedding("model.embed_tokens"),
    key_head_numbers("number_k"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    heads_rms_norm(LAYER + "self_attn.q_norm", heads="n"),
    heads_rms_norm(LAYER + "self_attn.k_norm", heads="k"),
    rms_norm(LAYER + "post_attention_layernorm"),
    router(LAYER + "mlp.gate", MLP + "gate"),
    *experts(LAYER + "mlp.experts", MLP + "experts"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
