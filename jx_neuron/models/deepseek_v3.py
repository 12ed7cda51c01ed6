"""DeepSeek-V3 and R1 (DeepSeek-AI, arXiv:2412.19437): latent attention, and experts by sigmoids, one of every token.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/deepseek_v3/modeling_deepseek_v3.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.latent import LatentConfig, latent_attention
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, GroupedExpertsConfig, correction, experts, router, stacked_experts
from jx_neuron.models.rows import embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.latent_attention import LATENT, LatentAttention
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import GatedMLP


@dataclass(frozen=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """HF's DeepseekV3Config."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128
    max_position_embeddings: int = 4096
    rope_interleave: bool | None = True
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = field(default=3, metadata={"least": 0})
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool | None = True
    routed_scaling_factor: float = 2.5

    MODEL_TYPE = "deepseek_v3"
    COMPLETE = True
    INERT = TRAINING | LatentConfig.UNREAD | {"num_mtp_layers", "num_nextn_predict_layers"}
    # what DeepSeek's own code reads, and HF's has no other way of
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "moe_layer_freq": (1,),
        "partial_rotary_factor": (1.0, None),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "n_routed_experts"}


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps, sizes, act = cfg.hidden_size, cfg.rms_norm_eps, cfg.sizes_of(layer), cfg.hidden_act
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = LatentAttention(
            sizes,
            low_rank=cfg.q_lora_rank is not None,
            bias=cfg.attention_bias,
            scale=cfg.scale,
            rope=rope_interleaved if cfg.rope_interleave else rope_half,
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(d, eps)
        mlp = GatedMLP(sizes, act, bias=False, rngs=rngs)
        self.mlp: nnx.Module = mlp
        if cfg.has_experts(layer):
            gate = Router(
                sizes,
                cfg.chosen,
                score="sigmoid",
                corrected=True,
                groups=cfg.groups,
                normalize=bool(cfg.norm_topk_prob),
                eps=1e-20,
                scale=cfg.routed_scaling_factor,
                rngs=rngs,
            )
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
    *gated_mlp(LAYER + "mlp", bias=False),
    router(LAYER + "mlp.gate", MLP + "gate"),
    correction(LAYER + "mlp.gate.e_score_correction_bias", MLP + "gate"),
    *experts(LAYER + "mlp.experts", MLP + "experts"),
    *stacked_experts(LAYER + "mlp.experts.gate_up_proj", LAYER + "mlp.experts.down_proj", MLP + "experts"),
    *gated_mlp(LAYER + "mlp.shared_experts", MLP + "shared_expert", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)
STATE = LATENT

# as HF does, the layer that predicts several tokens at once
IGNORE = (*EXTRA_TENSORS, r"layers\.61\..*")
