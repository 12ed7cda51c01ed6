"""gpt-oss (OpenAI, arXiv:2508.10925): attention with sinks, and experts with biases and clamped activations.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_oss/modeling_gpt_oss.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    FULL,
    SLIDING,
    LayerTypesConfig,
    LlamaLikeConfig,
    LlamaLikeModel,
)
from jx_neuron.models.mixture import IN, OUT, TRAINING, ExpertsConfig, router
from jx_neuron.models.rows import attention, embedding, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention


@dataclass(frozen=True)
class Config(ExpertsConfig, LayerTypesConfig, LlamaLikeConfig):
    """HF's GptOssConfig."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    sliding_window: int | None = 128
    attention_bias: bool = True
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    MODEL_TYPE = "gpt_oss"
    COMPLETE = True
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    INERT = TRAINING
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }

    @property
    def usual_types(self) -> list[str]:
        return [FULL if layer % 2 else SLIDING for layer in range(self.layers)]


class ClampedExperts(Experts):
    """(up + 1) · gate · sigmoid(alpha · gate), of clamped gate and up."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg.sizes, "silu", bias=True, rngs=rngs)
        self.alpha, self.limit = cfg.swiglu_alpha, cfg.swiglu_limit

    def gated(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, window=cfg.windows[layer], sinks=True, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = MoE(Router(cfg.sizes, cfg.chosen, after=True, bias=True, rngs=rngs), ClampedExperts(cfg, rngs))

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
HF, OURS = LAYER + "mlp.experts.", MLP + "experts."
GATE, UP = "(m ([1] + 1))", "(m (1 + [1]))"  # one after the other
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    W(LAYER + "self_attn.sinks", "layers.{i}.self_attn.sinks", "n -> n", P(AXIS)),
    rms_norm(LAYER + "post_attention_layernorm"),
    router(LAYER + "mlp.router", MLP + "gate"),
    W(LAYER + "mlp.router.bias", MLP + "gate.logits.bias", "e -> e"),
    W(HF + "gate_up_proj", OURS + "gate_proj.kernel", f"e d {GATE} -> e d m", IN),
    W(HF + "gate_up_proj", OURS + "up_proj.kernel", f"e d {UP} -> e d m", IN),
    W(HF + "gate_up_proj_bias", OURS + "gate_proj.bias", f"e {GATE} -> e m", P(None, AXIS)),
    W(HF + "gate_up_proj_bias", OURS + "up_proj.bias", f"e {UP} -> e m", P(None, AXIS)),
    W(HF + "down_proj", OURS + "down_proj.kernel", "e m d -> e m d", OUT),
    W(HF + "down_proj_bias", OURS + "down_proj.bias", "e d -> e d"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
