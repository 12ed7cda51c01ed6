"""MiniMax-M2 (MiniMax, 2025): norms of whole queries and keys, and experts by sigmoids.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/minimax_m2/modeling_minimax_m2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, HeadsNormModel, LlamaLikeConfig
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, correction, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, heads_rms_norm, key_head_numbers, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import HeadsRMSNorm, RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import HeadsNormAttention


@dataclass(frozen=True)
class Config(ExpertsConfig, LlamaLikeConfig):
    """HF's MiniMaxM2Config; `rotary_dim` is how released checkpoints say partial_rotary_factor."""

    vocab_size: int = 200064
    hidden_size: int = 3072
    intermediate_size: int = 1536
    num_hidden_layers: int = 62
    num_attention_heads: int = 48
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 196608
    rope_theta: float = 5000000.0
    rotary_dim: int | None = None
    rotary_factor: float | None = field(default=None, metadata={"hf": "partial_rotary_factor"})
    num_local_experts: int = 256
    num_experts_per_tok: int = 8

    MODEL_TYPE = "minimax_m2"
    COMPLETE = True
    LAYERS_ALIKE = True
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    INERT = TRAINING
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}

    @property
    def partial_rotary_factor(self) -> float:
        """The rotated part of a head."""
        rotated = 1.0 if self.rotary_dim is None else self.rotary_dim / self.sizes["h"]
        return rotated if self.rotary_factor is None else self.rotary_factor


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h = (cfg.sizes[c] for c in "dnkh")
        eps = cfg.rms_norm_eps
        q_norm, k_norm = HeadsRMSNorm(n, h, eps), HeadsRMSNorm(k, h, eps)
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = HeadsNormAttention(cfg.sizes, bias=False, q_norm=q_norm, k_norm=k_norm, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        gate = Router(cfg.sizes, cfg.chosen, score="sigmoid", corrected=True, normalize=True, rngs=rngs)
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
MOE, BIAS = LAYER + "block_sparse_moe.", "e_score_correction_bias"
WEIGHTS = (
    embedding("model.embed_tokens"),
    key_head_numbers("number_k"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", bias=False),
    heads_rms_norm(LAYER + "self_attn.q_norm", heads="n"),
    heads_rms_norm(LAYER + "self_attn.k_norm", heads="k"),
    rms_norm(LAYER + "post_attention_layernorm"),
    router(MOE + "gate", MLP + "gate"),
    correction(MOE + BIAS, MLP + "gate"),
    *experts(MOE + "experts", MLP + "experts", gate="w1", up="w3", down="w2"),
    # as transformers 5 has them in memory
    router(LAYER + "mlp.gate", MLP + "gate"),
    correction(LAYER + "mlp." + BIAS, MLP + "gate"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
