"""Mixtral (Jiang et al., arXiv:2401.04088).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/mixtral/modeling_mixtral.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel, SlidingWindowConfig
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention


@dataclass(frozen=True)
class Config(ExpertsConfig, SlidingWindowConfig, LlamaLikeConfig):
    """HF's MixtralConfig."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    MODEL_TYPE = "mixtral"
    COMPLETE = True
    LAYERS_ALIKE = True
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    INERT = TRAINING
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=False, window=cfg.window, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        gate = Router(cfg.sizes, cfg.chosen, normalize=True, rngs=rngs)
        self.mlp = MoE(gate, Experts(cfg.sizes, cfg.hidden_act, rngs=rngs))

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
MOE = LAYER + "block_sparse_moe."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", bias=False),
    rms_norm(LAYER + "post_attention_layernorm"),
    router(MOE + "gate", MLP + "gate"),
    *experts(MOE + "experts", MLP + "experts", gate="w1", up="w3", down="w2"),
    # as transformers 5 has them in memory
    router(LAYER + "mlp.gate", MLP + "gate"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
