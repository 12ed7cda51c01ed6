"""Mamba-2 (Dao, Gu, arXiv:2405.21060): no attention, and no MLP.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/mamba2/modeling_mamba2.py
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.recurrent import mamba2, mamba2_state, require_any_time_step
from jx_neuron.models.rows import embedding, rms_norm
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.mamba2 import GroupsRMSNorm, Mamba2
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's Mamba2Config."""

    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    num_heads: int = 128
    head_dim: int = 64
    n_groups: int = 8
    expand: int = 2
    conv_kernel: int = field(default=4, metadata={"least": 2})
    layer_norm_epsilon: float = 1e-5
    hidden_act: str = "silu"
    use_bias: bool = False
    use_conv_bias: bool = True
    residual_in_fp32: bool = True
    time_step_limit: list[Any] | tuple[Any, ...] | None = (0.0, inf)
    tie_word_embeddings: bool = False

    MODEL_TYPE = "mamba2"
    COMPLETE = True
    LAYERS_ALIKE = True
    # how parameters begin in training, and how many tokens HF computes at a time
    INERT = frozenset(
        "chunk_size layer_types rescale_prenorm_residual time_step_floor time_step_max time_step_min "
        "time_step_rank".split()
    )

    def __post_init__(self) -> None:
        one_of("mamba2", "hidden_act", self.hidden_act, ACT)
        divisible("mamba2", "num_heads", self.num_heads, "n_groups", self.n_groups)
        require_any_time_step("mamba2", self.time_step_limit)
        if self.hidden_size * self.expand != self.num_heads * self.head_dim:
            raise ConfigError(
                f"mamba2: num_heads={self.num_heads} of head_dim={self.head_dim} make up "
                f"{self.num_heads * self.head_dim}, not expand={self.expand} times hidden_size={self.hidden_size}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        p, g, w = self.num_heads, self.n_groups, self.conv_kernel
        heads = dict(p=p, g=g, o=g, i=self.head_dim, j=self.state_size, w=w, r=w - 1)
        return dict(d=self.hidden_size, v=self.vocab_size) | heads


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.norm = RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mixer = Mamba2(
            cfg.sizes,
            bias=cfg.use_bias,
            conv_bias=cfg.use_conv_bias,
            act=ACT[cfg.hidden_act],
            norm=GroupsRMSNorm(cfg.sizes, cfg.layer_norm_epsilon),
            rngs=rngs,
        )

    def __call__(self, x_btd: Array, state: LayerState, at: Positions) -> tuple[Array, LayerState]:
        y_btd, state = self.mixer(self.norm(x_btd).astype(self.mixer.D.dtype), state, at)
        return x_btd + y_btd, state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        blocks = (Block(cfg, rngs) for _ in range(cfg.layers))
        super().__init__(cfg, blocks, RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon), rngs)
        self.residual_in_fp32 = cfg.residual_in_fp32

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = super().__call__(tokens_bt, state, at)
        return x_btd.astype(self.norm.scale.dtype), state

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        x_btd = super().embed(tokens_bt, at)
        return x_btd.astype(jnp.float32) if self.residual_in_fp32 else x_btd


STATE = mamba2_state()
WEIGHTS = (
    embedding("backbone.embeddings", "embed_tokens"),
    rms_norm("backbone.layers.{i}.norm"),
    *mamba2("backbone.layers.{i}.mixer"),
    rms_norm("backbone.norm_f", "norm"),
    embedding("lm_head"),
)

IGNORE = (Copy("lm_head.weight", of="backbone.embeddings.weight"),)
