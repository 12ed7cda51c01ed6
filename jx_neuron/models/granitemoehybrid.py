"""Granite 4 without experts (IBM, 2025): Mamba-2 in most layers, attention without positions in the others.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/granitemoehybrid/modeling_granitemoehybrid.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import one_of
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.recurrent import ATTENTION, FULL, LINEAR, HybridConfig, MambaConfig, mamba2, mamba2_state
from jx_neuron.models.rows import GATE, UP, attention, column_parallel, embedding, rms_norm, row_parallel
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.mamba2 import GroupsRMSNorm, Mamba2
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(HybridConfig, MambaConfig):
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

    MODEL_TYPE = "granitemoehybrid"
    COMPLETE = True
    ALIASES = {"layers_block_type": "layer_types"}  # noqa: RUF012
    # of experts, and how many tokens HF computes at a time
    INERT = frozenset(
        "init_method mamba_chunk_size normalization_function num_experts_per_tok output_router_logits "
        "router_aux_loss_coef".split()
    )
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {**MambaConfig.ONLY, "num_local_experts": (0,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(
            "granitemoehybrid", "position_embedding_type", self.position_embedding_type or "nope", dict(rope=1, nope=1)
        )

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | dict(f=self.shared_intermediate_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, attends = cfg.hidden_size, cfg.rms_norm_eps, cfg.types[layer] == FULL
        self.input_layernorm = RMSNorm(d, eps)
        bias, scale, act = cfg.attention_bias, cfg.attention_multiplier, ACT[cfg.hidden_act]
        self.self_attn: Any = Attention(cfg.sizes, bias=bias, scale=scale, rngs=rngs) if attends else None
        self.mamba: Any = (
            None
            if attends
            else Mamba2(
                cfg.sizes,
                bias=cfg.mamba_proj_bias,
                conv_bias=cfg.mamba_conv_bias,
                act=act,
                norm=GroupsRMSNorm(cfg.sizes, eps),
                rngs=rngs,
            )
        )
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.shared_mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.residual_multiplier = cfg.residual_multiplier

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation | None) -> tuple[Array, LayerState]:
        y_btd = self.input_layernorm(x_btd)
        y_btd, state = self.mamba(y_btd, state, at) if self.mamba else self.self_attn(y_btd, state, at, by)
        x_btd = x_btd + y_btd * self.residual_multiplier
        y_btd = self.shared_mlp(self.post_attention_layernorm(x_btd))
        return x_btd + y_btd * self.residual_multiplier, state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)
        self.rotates = cfg.position_embedding_type == "rope"
        self.embedding_multiplier, self.logits_scaling = cfg.embedding_multiplier, cfg.logits_scaling

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return super().embed(tokens_bt, at) * self.embedding_multiplier

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return super().block_args(at) if self.rotates else (None,)

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) / self.logits_scaling


L, O = "model.layers.{i}.", "layers.{i}."  # noqa: E741
STATE = (*ATTENTION, *mamba2_state(LINEAR))
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(L + "input_layernorm"),
    *attention(L + "self_attn"),
    *mamba2(L + "mamba"),
    rms_norm(L + "post_attention_layernorm"),
    *column_parallel(L + "shared_mlp.input_linear", O + "shared_mlp.gate_up.gate_proj", GATE, bias=False),
    *column_parallel(L + "shared_mlp.input_linear", O + "shared_mlp.gate_up.up_proj", UP, bias=False),
    *row_parallel(L + "shared_mlp.output_linear", O + "shared_mlp.down_proj", "f", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
