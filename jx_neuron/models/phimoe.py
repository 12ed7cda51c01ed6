"""Phi-3.5-MoE (Abdin et al., arXiv:2404.14219): LayerNorms, and two experts by SparseMixer (arXiv:2409.12136).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/phimoe/modeling_phimoe.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel, SlidingWindowConfig
from jx_neuron.models.mixture import ExpertsConfig, experts, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, head_bias, layer_norm
from jx_neuron.nn.experts import Experts, MoE, is_chosen
from jx_neuron.nn.layers import LayerNorm, Linear
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention


@dataclass(frozen=True)
class Config(ExpertsConfig, SlidingWindowConfig, LlamaLikeConfig):
    """HF's PhimoeConfig."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 6400
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    attention_bias: bool = False
    lm_head_bias: bool = False
    num_local_experts: int = 16
    router_jitter_noise: float = field(default=0.01, metadata={"least": 0})

    MODEL_TYPE = "phimoe"
    COMPLETE = True
    LAYERS_ALIKE = True
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    # num_experts_per_tok: HF takes two whatever it says
    INERT = frozenset("input_jitter_noise num_experts_per_tok output_router_logits router_aux_loss_coef".split())
    ROPE_KEYS = frozenset({"short_mscale", "long_mscale"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope.kind != "default" and not self.rope.parameters.keys() >= self.ROPE_KEYS:
            raise ConfigError(
                f"phimoe: rope_type {self.rope.kind!r} needs numbers short_mscale and long_mscale in rope_parameters"
            )

    @property
    def chosen(self) -> int:
        return 2

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        """HF rotates by the short factors, whatever the length, and scales by `mscale` alone."""
        fields = super().rope_fields
        match fields.get("rope_type", fields.get("type")):
            case "longrope":
                return {**fields, "attention_factor": 1.0, "long_factor": fields.get("short_factor")}
            case "yarn":
                return {**fields, "attention_factor": 1.0}
        return fields


class SparseMixer(nnx.Module):
    """Two experts, each weighed by its softmax among those whose logits are not far below its own."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.logits = Linear((cfg.sizes["d"],), (cfg.sizes["e"],), bias=False, rngs=rngs)
        self.distance = 2 * cfg.router_jitter_noise

    def __call__(self, x_btd: Array) -> tuple[Array, Array]:
        """Weights [b, t, 2] and numbers [b, t, 2] of the experts of each token."""
        logits_bte = self.logits(x_btd.astype(jnp.float32))
        best_bt2, index_bt2 = jax.lax.top_k(logits_bte, 2)
        first_bte = is_chosen(index_bt2, logits_bte)[:, :, 0]
        weights = []
        for number, left_bte in enumerate((logits_bte, jnp.where(first_bte, jnp.finfo(jnp.float32).min, logits_bte))):
            best_bt1 = best_bt2[..., number, None]
            far_bte = (best_bt1 - logits_bte) / jnp.maximum(jnp.abs(logits_bte), best_bt1) > self.distance
            weights.append(1 / jnp.sum(jnp.where(far_bte, 0, jnp.exp(left_bte - best_bt1)), axis=-1))
        return jnp.stack(weights, axis=-1), index_bt2


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = LayerNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, window=cfg.window, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, eps)
        self.mlp = MoE(SparseMixer(cfg, rngs), Experts(cfg.sizes, cfg.hidden_act, rngs=rngs))

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm, blocks = LayerNorm(cfg.hidden_size, cfg.rms_norm_eps), (Block(cfg, rngs) for _ in range(cfg.layers))
        super().__init__(cfg, blocks, rngs, norm=norm, head_bias=cfg.lm_head_bias)

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        rotation: Rotation = self.rope(at)
        if self.rope.kind == "default":
            return (rotation,)
        short, long = (self.rope.parameters[name] for name in ("short_mscale", "long_mscale"))
        scale_b11 = jnp.where(at.extent_b > self.rope.original, long, short)[:, None, None].astype(jnp.float32)
        return (Rotation(rotation.cos_btr * scale_b11, rotation.sin_btr * scale_b11),)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
MOE = LAYER + "block_sparse_moe."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    *layer_norm(LAYER + "post_attention_layernorm"),
    router(MOE + "gate", MLP + "gate"),
    *experts(MOE + "experts", MLP + "experts", gate="w1", up="w3", down="w2"),
    # as transformers 5 has them in memory
    router(LAYER + "mlp.router", MLP + "gate"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    *layer_norm("model.norm"),
    embedding("lm_head"),
    head_bias("lm_head", "lm_head_bias"),
)

IGNORE = EXTRA_TENSORS
