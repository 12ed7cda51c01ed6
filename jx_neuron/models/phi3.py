"""Phi-3 and Phi-4 (Abdin et al., arXiv:2404.14219, arXiv:2412.08905).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/phi3/modeling_phi3.py
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
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(SlidingWindowConfig, LlamaLikeConfig):
    """HF's Phi3Config."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int | None = 4096
    partial_rotary_factor: float = 1.0
    rms_norm_eps: float = 1e-5

    MODEL_TYPE = "phi3"
    COMPLETE = True
    LAYERS_ALIKE = True
    USUAL: ClassVar[Mapping[str, Any]] = {
        **LlamaLikeConfig.USUAL,
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope.kind not in ("default", "longrope"):
            raise ConfigError(f"phi3: rope_type {self.rope.kind!r} is not supported, only default and longrope")

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        fields = super().rope_fields
        older = fields.get("rope_type", fields.get("type")) in ("su", "yarn")  # LongRoPE in the first checkpoints
        return {**fields, "rope_type": "longrope"} if older else fields


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=False, window=cfg.window, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", fused="qkv_proj", bias=False),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", fused="gate_up_proj", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
