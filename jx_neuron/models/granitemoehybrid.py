"""Granite 4 (IBM, 2025): Mamba-2 in most layers, attention without positions in the others, experts in large models.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/granitemoehybrid/modeling_granitemoehybrid.py
"""

from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from jx_neuron.checkpoint.hf_config import one_of
from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, ScaledModel
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, granite_experts
from jx_neuron.models.recurrent import (
    ATTENTION,
    FULL,
    LINEAR,
    HybridBlock,
    HybridConfig,
    MambaConfig,
    mamba2,
    mamba2_layer,
    mamba2_state,
)
from jx_neuron.models.rows import GATE, UP, attention, column_parallel, embedding, rms_norm, row_parallel
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.state import Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(ExpertsConfig, HybridConfig, MambaConfig):
    """HF's GraniteMoeHybridConfig."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    shared_intermediate_size: int = 1024
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    attention_bias: bool = False
    position_embedding_type: str | None = None
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    num_local_experts: int = field(default=8, metadata={"least": 0})
    num_experts_per_tok: int = field(default=2, metadata={"least": 0})

    MODEL_TYPE = "granitemoehybrid"
    COMPLETE = True
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    ALIASES = {"layers_block_type": "layer_types"}  # noqa: RUF012
    # of experts, and how many tokens HF computes at a time
    INERT = TRAINING | {"init_method", "mamba_chunk_size", "normalization_function"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positions, family = self.position_embedding_type or "nope", self.MODEL_TYPE
        one_of(family, "position_embedding_type", positions, dict(rope=1, nope=1))
        if self.num_local_experts and not self.chosen:
            raise ConfigError(f"{family}: num_experts_per_tok=0 is legal only where num_local_experts is 0 too")

    @property
    def chosen(self) -> int:
        """How many experts a token has; 0 where there are none."""
        return super().chosen if self.num_local_experts else 0

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | dict(f=self.shared_intermediate_size, e=self.num_local_experts or 1)


class Block(HybridBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, scale, act = cfg.hidden_size, cfg.rms_norm_eps, cfg.attention_multiplier, cfg.hidden_act
        if cfg.types[layer] == FULL:
            mixer: nnx.Module = Attention(cfg.sizes, bias=cfg.attention_bias, scale=scale, rngs=rngs)
        else:
            mixer = mamba2_layer(cfg, rngs=rngs)
        mlp: nnx.Module = GatedMLP(cfg.sizes, act, bias=False, rngs=rngs)
        if cfg.chosen:
            gate = Router(cfg.sizes, cfg.chosen, after=True, rngs=rngs)
            mlp = MoE(gate, Experts(cfg.sizes, act, rngs=rngs), mlp)
        super().__init__(RMSNorm(d, eps), mixer, RMSNorm(d, eps), mlp, cfg.residual_multiplier)


class Model(ScaledModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        scales = dict(embedding_scale=cfg.embedding_multiplier, logits_scale=1 / cfg.logits_scaling)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, **scales)
        self.rotates = cfg.position_embedding_type == "rope"

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return super().block_args(at) if self.rotates else (None,)


def shared_mlp(target: str) -> tuple[W, ...]:
    """The MLP of every layer, alone or next to experts."""
    return (
        *column_parallel(L + "shared_mlp.input_linear", target + ".gate_up.gate_proj", GATE, bias=False),
        *column_parallel(L + "shared_mlp.input_linear", target + ".gate_up.up_proj", UP, bias=False),
        *row_parallel(L + "shared_mlp.output_linear", target + ".down_proj", "f", bias=False),
    )


L, O = "model.layers.{i}.", "layers.{i}."  # noqa: E741
STATE = (*ATTENTION, *mamba2_state(LINEAR))
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(L + "input_layernorm", O + "norm"),
    *attention(L + "self_attn", O + "mixer"),
    *mamba2(L + "mamba", O + "mixer"),
    rms_norm(L + "post_attention_layernorm", O + "mlp_norm"),
    *shared_mlp(O + "mlp"),
    *shared_mlp(O + "mlp.shared_expert"),
    *granite_experts(L + "block_sparse_moe", O + "mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
