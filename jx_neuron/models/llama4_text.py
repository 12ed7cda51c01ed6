"""Llama 4, its text model (Meta, 2025): chunked attention, layers without positions, and a shared expert.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama4/modeling_llama4.py
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    FULL,
    LayerTypesConfig,
    LlamaLikeConfig,
    LlamaLikeModel,
    NoRopeLayersConfig,
)
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, router, stacked_experts
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation, query_scale, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import GatedMLP, NormAfterRopeAttention


@dataclass(frozen=True)
class Config(ExpertsConfig, NoRopeLayersConfig, LayerTypesConfig, LlamaLikeConfig):
    """HF's Llama4TextConfig."""

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    intermediate_size_mlp: int = 16384
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    attention_bias: bool = False
    use_qk_norm: bool = True
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: int = 1
    sliding_window: int | None = field(default=8192, metadata={"hf": "attention_chunk_size"})
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = field(default=0.1, metadata={"least": 0})

    MODEL_TYPE = "llama4_text"
    COMPLETE = True
    WINDOWED: ClassVar[tuple[str, str]] = ("chunked_attention", "attention_chunk_size")
    EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    INERT = TRAINING | {"cache_implementation", "for_llm_compressor"}

    @property
    def usual_types(self) -> list[str]:
        return [FULL if self.window is None or not rotates else self.WINDOWED[0] for rotates in self.rotates]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and no dense MLP."""
        usual = (layer + 1) % self.interleave_moe_layer_step == 0
        return usual if self.moe_layers is None else layer in self.moe_layers

    def sizes_of(self, layer: int) -> dict[str, int]:
        return self.sizes | dict(f=self.intermediate_size if self.has_experts(layer) else self.intermediate_size_mlp)


class TunedAttention(NormAfterRopeAttention):
    """Without RoPE, queries are not normalized but scaled by their positions."""

    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        chunk = cfg.windows[layer]
        norm = RMSNorm(cfg.sizes["h"], cfg.rms_norm_eps, affine=False) if cfg.use_qk_norm else None
        options: dict[str, Any] = dict(q_norm=norm, k_norm=norm, rope=rope_interleaved, window=chunk, chunk=chunk)
        super().__init__(cfg.sizes, bias=cfg.attention_bias, **options, rngs=rngs)
        self.rotates, self.tuned = cfg.rotates[layer], cfg.attn_temperature_tuning

    def heads(self, x_btd: Array, by: tuple[Rotation, Array]) -> tuple[Array, Array, Array]:
        rotation, scale_bt11 = by
        if self.rotates:
            return super().heads(x_btd, rotation)
        q_btnh, k_btkh, v_btkh = self.qkv(x_btd)
        return q_btnh * scale_bt11.astype(q_btnh.dtype) if self.tuned else q_btnh, k_btkh, v_btkh


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, sizes, act = cfg.hidden_size, cfg.rms_norm_eps, cfg.sizes_of(layer), cfg.hidden_act
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = TunedAttention(cfg, layer, rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        mlp = GatedMLP(sizes, act, bias=False, rngs=rngs)
        self.feed_forward: nnx.Module = mlp
        if cfg.has_experts(layer):
            gate = Router(sizes, cfg.chosen, score="sigmoid", rngs=rngs)
            self.feed_forward = MoE(gate, Experts(sizes, act, weigh_input=True, rngs=rngs), mlp)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: tuple[Rotation, Array]
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.feed_forward(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)
        self.attn_scale, self.floor_scale = cfg.attn_scale, cfg.floor_scale

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return ((self.rope(at), query_scale(at, self.attn_scale, self.floor_scale, first=1)),)


LAYER, MLP = "model.layers.{i}.feed_forward", "layers.{i}.feed_forward."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm("model.layers.{i}.input_layernorm"),
    *attention("model.layers.{i}.self_attn"),
    rms_norm("model.layers.{i}.post_attention_layernorm"),
    *gated_mlp(LAYER, bias=False),
    router(LAYER + ".router", MLP + "gate"),
    *stacked_experts(LAYER + ".experts.gate_up_proj", LAYER + ".experts.down_proj", MLP + "experts", transposed=True),
    *gated_mlp(LAYER + ".shared_expert", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
