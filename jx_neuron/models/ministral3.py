"""Ministral 3 (Mistral AI, arXiv:2601.08584).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/ministral3/modeling_ministral3.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel, SlidingWindowConfig
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation, query_scale
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(SlidingWindowConfig, LlamaLikeConfig):
    """HF's Ministral3Config."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5

    MODEL_TYPE = "ministral3"
    COMPLETE = True
    LAYERS_ALIKE = True
    ROPE_KEYS = frozenset({"llama_4_scaling_beta", "max_position_embeddings"})
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if "llama_4_scaling_beta" not in self.rope.parameters:
            raise ConfigError("ministral3: rope_parameters needs llama_4_scaling_beta, a number")


class ScaledAttention(Attention):
    """Queries are scaled by their positions, after RoPE."""

    def heads(self, x_btd: Array, by: tuple[Rotation, Array]) -> tuple[Array, Array | None, Array | None]:
        rotation, scale_bt11 = by
        q_btnh, k_btkh, v_btkh = super().heads(x_btd, rotation)
        return q_btnh * scale_bt11.astype(q_btnh.dtype), k_btkh, v_btkh


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = ScaledAttention(cfg.sizes, bias=False, window=cfg.window, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: tuple[Rotation, Array]
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)
        self.beta = cfg.rope.parameters["llama_4_scaling_beta"]

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return ((self.rope(at), query_scale(at, self.beta, self.rope.original)),)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", bias=False),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
