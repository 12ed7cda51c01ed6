"""Falcon-H1 (TII, arXiv:2507.22448): Mamba-2 and attention side by side in every layer, and scales on what enters both.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/falcon_h1/modeling_falcon_h1.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, ScaledModel
from jx_neuron.models.recurrent import MambaConfig, mamba2, mamba2_layer, mamba2_state
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.layout import KV
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(MambaConfig):
    """HF's FalconH1Config."""

    vocab_size: int = 128000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    projectors_bias: bool = False
    mamba_d_ssm: int | None = 1024
    mamba_rms_norm: bool = False
    mamba_norm_before_gate: bool = True
    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    mlp_multipliers: list[float] | None = None
    ssm_multipliers: list[float] | None = None

    MODEL_TYPE = "falcon_h1"
    COMPLETE = True
    LAYERS_ALIKE = True
    ALIASES = {"layer_types": "layers_block_type"}  # noqa: RUF012
    # how many tokens HF computes at a time, of how many it gives logits, and what files of the Hub have besides it
    INERT = frozenset(
        "attn_layer_indices layer_types layers_block_type mamba_chunk_size mamba_use_mlp mlp_expansion_factor "
        "num_logits_to_keep".split()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
            if (scales := getattr(self, name)) is not None and len(scales) != count:
                raise ConfigError(f"falcon_h1: {name} should have {count} numbers, and has {len(scales)}")

    @property
    def mamba_width(self) -> int:
        return super().mamba_width if self.mamba_d_ssm is None else self.mamba_d_ssm


@dataclass(frozen=True)
class ScaledAct:
    """act(scale · x)."""

    act: str
    scale: float

    def __call__(self, x: Array) -> Array:
        return ACT[self.act](x * self.scale)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        gate_scale, self.down_scale = cfg.mlp_multipliers or (1.0, 1.0)
        self.input_layernorm = RMSNorm(d, eps)
        self.mamba = mamba2_layer(
            cfg,
            has_norm=cfg.mamba_rms_norm,
            out_bias=cfg.projectors_bias,
            gate_first=not cfg.mamba_norm_before_gate,
            scales=cfg.ssm_multipliers,
            rngs=rngs,
        )
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, scale=cfg.key_multiplier / h**0.5, rngs=rngs)
        self.pre_ff_layernorm = RMSNorm(d, eps)
        self.feed_forward = GatedMLP(cfg.sizes, ScaledAct(cfg.hidden_act, gate_scale), bias=cfg.mlp_bias, rngs=rngs)
        self.ssm_scales = cfg.ssm_in_multiplier, cfg.ssm_out_multiplier
        self.attention_scales = cfg.attention_in_multiplier, cfg.attention_out_multiplier

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        y_btd, (s_in, s_out), (a_in, a_out) = self.input_layernorm(x_btd), self.ssm_scales, self.attention_scales
        s_btd, state = self.mamba(y_btd * s_in, state, at)
        a_btd, state = self.self_attn(y_btd * a_in, state, at, by)
        x_btd = x_btd + s_btd * s_out + a_btd * a_out
        return x_btd + self.feed_forward(self.pre_ff_layernorm(x_btd)) * self.down_scale, state


class Model(ScaledModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        scales = dict(embedding_scale=cfg.embedding_multiplier, logits_scale=cfg.lm_head_multiplier)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, **scales)


LAYER = "model.layers.{i}."
STATE = (*KV, *mamba2_state())
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *mamba2(LAYER + "mamba"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "pre_ff_layernorm"),
    *gated_mlp(LAYER + "feed_forward"),
    rms_norm("model.final_layernorm", "norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
