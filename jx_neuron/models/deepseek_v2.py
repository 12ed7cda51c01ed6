"""DeepSeek-V2 (DeepSeek-AI, arXiv:2405.04434): latent attention, and experts of the groups with the best of them.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/deepseek_v2/modeling_deepseek_v2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import one_of
from jx_neuron.errors import ConfigError
from jx_neuron.models.latent import LatentConfig, latent_attention
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, GroupedExpertsConfig, experts, router, stacked_experts
from jx_neuron.models.rows import embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.latent_attention import LATENT, LatentAttention
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import GatedMLP

METHODS: Mapping[str, tuple[str, ...]] = {"greedy": (), "group_limited_greedy": ("n_group", "topk_group")}
"""How experts are chosen: of all, or of some groups. Each with the fields that it needs."""


@dataclass(frozen=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """HF's DeepseekV2Config."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    mlp_bias: bool = False
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407
    first_k_dense_replace: int = field(default=0, metadata={"least": 0})
    topk_method: str | None = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0

    MODEL_TYPE = "deepseek_v2"
    COMPLETE = True
    INERT = TRAINING | LatentConfig.UNREAD
    # what DeepSeek's own code reads, and HF's has no other way of
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "moe_layer_freq": (1,),
        "norm_topk_prob": (False, None),
        "partial_rotary_factor": (1.0, None),
        "scoring_func": ("softmax",),
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "n_routed_experts"}
    BEST = 1

    def __post_init__(self) -> None:
        one_of(self.MODEL_TYPE, "topk_method", self.topk_method, METHODS)
        needed = ("num_experts_per_tok", *METHODS[str(self.topk_method)])
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ConfigError(f"{self.MODEL_TYPE}: {missing[0]} is null; it should be a number")
        super().__post_init__()

    @property
    def groups(self) -> tuple[int, int]:
        return (1, 1) if self.topk_method == "greedy" else super().groups


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, sizes, act = cfg.hidden_size, cfg.rms_norm_eps, cfg.sizes_of(layer), cfg.hidden_act
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = LatentAttention(
            sizes,
            low_rank=cfg.q_lora_rank is not None,
            bias=cfg.attention_bias,
            scale=cfg.scale,
            rope=rope_interleaved,
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(d, eps)
        mlp = GatedMLP(sizes, act, bias=cfg.mlp_bias, rngs=rngs)
        self.mlp: nnx.Module = mlp
        if cfg.has_experts(layer):
            options: dict[str, Any] = dict(groups=cfg.groups, best=cfg.BEST, scale=cfg.routed_scaling_factor)
            gate = Router(sizes, cfg.chosen, **options, rngs=rngs)
            self.mlp = MoE(gate, Experts(sizes, act, rngs=rngs), mlp)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER, MLP = "model.layers.{i}.", "layers.{i}.mlp."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *latent_attention(LAYER + "self_attn"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp"),
    router(LAYER + "mlp.gate", MLP + "gate"),
    *experts(LAYER + "mlp.experts", MLP + "experts"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    *gated_mlp(LAYER + "mlp.shared_experts", MLP + "shared_expert"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)
STATE = LATENT
IGNORE = EXTRA_TENSORS
