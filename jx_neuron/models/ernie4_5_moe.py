"""ERNIE 4.5 with experts (Baidu ERNIE Team, 2025).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/ernie4_5_moe/modeling_ernie4_5_moe.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, gated_mlp, head_bias, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(ExpertsConfig, LlamaLikeConfig):
    """HF's Ernie4_5_MoeConfig."""

    vocab_size: int = 103424
    hidden_size: int = 2560
    intermediate_size: int = 12288
    num_hidden_layers: int = 28
    num_attention_heads: int = 20
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = True
    use_bias: bool | None = False
    moe_num_experts: int = 64
    moe_k: int = 6
    moe_intermediate_size: int = 1536
    moe_num_shared_experts: int = field(default=2, metadata={"least": 0})
    moe_layer_start_index: int = field(default=1, metadata={"least": 0})
    moe_layer_end_index: int = field(default=-1, metadata={"least": -1})
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12

    MODEL_TYPE = "ernie4_5_moe"
    COMPLETE = True
    EXPERTS = ("moe_num_experts", "moe_k", "moe_intermediate_size")
    INERT = TRAINING
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and no dense MLP."""
        last = self.layers - 1 if self.moe_layer_end_index == -1 else self.moe_layer_end_index
        return self.moe_layer_start_index <= layer <= last and (layer + 1) % self.moe_layer_interval == 0

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | dict(one=1)

    def sizes_of(self, layer: int) -> dict[str, int]:
        shared = self.moe_intermediate_size * max(self.moe_num_shared_experts, 1)
        return self.sizes | dict(f=shared if self.has_experts(layer) else self.intermediate_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, sizes, bias, act = (
            cfg.hidden_size,
            cfg.rms_norm_eps,
            cfg.sizes_of(layer),
            bool(cfg.use_bias),
            cfg.hidden_act,
        )
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(sizes, bias=bias, rope=rope_interleaved, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        mlp = GatedMLP(sizes, act, bias=bias, rngs=rngs)
        self.mlp: nnx.Module = mlp
        if cfg.has_experts(layer):
            gate = Router(sizes, cfg.chosen, corrected=True, normalize=True, least=cfg.moe_norm_min, rngs=rngs)
            gate.correction = nnx.Param(jnp.zeros((1, sizes["e"])))
            self.mlp = MoE(gate, Experts(sizes, act, rngs=rngs), mlp if cfg.moe_num_shared_experts else None)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        blocks = (Block(cfg, layer, rngs) for layer in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, head_bias=bool(cfg.use_bias))


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
BIAS = "moe_statics.e_score_correction_bias"
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp"),
    router(LAYER + "mlp.gate", MLP + "gate"),
    W(LAYER + "mlp." + BIAS, MLP + "gate.correction", "one e -> one e", exact=True),
    *experts(LAYER + "mlp.experts", MLP + "experts"),
    *gated_mlp(LAYER + "mlp.shared_experts", MLP + "shared_expert"),
    # as transformers 5 has them in memory
    W(LAYER + "mlp.gate." + BIAS, MLP + "gate.correction", "one e -> one e", exact=True),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    rms_norm("model.norm"),
    embedding("lm_head"),
    head_bias("lm_head", "lm_head_bias"),
)

# as HF does, what predicts several tokens at once
IGNORE = (*EXTRA_TENSORS, r".*mtp.*")
