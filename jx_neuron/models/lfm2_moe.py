"""LFM2 with experts (Liquid AI, arXiv:2511.23404), chosen by sigmoids, in all but its first layers.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/lfm2_moe/modeling_lfm2_moe.py
"""

from dataclasses import dataclass, field

from flax import nnx

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, correction, experts, router, stacked_experts
from jx_neuron.models.rows import embedding, rms_norm
from jx_neuron.models.short_conv import LFM2_LAYER, SHORT_CONV_STATE, ShortConvBlock, ShortConvConfig
from jx_neuron.nn.experts import Experts, MoE, Router
from jx_neuron.nn.sublayers import GatedMLP


@dataclass(frozen=True)
class Config(ExpertsConfig, ShortConvConfig):
    """HF's Lfm2MoeConfig."""

    vocab_size: int = 65536
    hidden_size: int = 2048
    intermediate_size: int = 7168
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 128000
    rope_theta: float = 1000000.0
    num_dense_layers: int = field(default=2, metadata={"least": 0})
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1792
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    MODEL_TYPE = "lfm2_moe"
    COMPLETE = True
    INERT = TRAINING

    @property
    def usual_types(self) -> list[str]:
        """Raises ConfigError: HF makes nothing of null."""
        raise ConfigError("lfm2_moe: layer_types is null; it should have conv or full_attention for each layer")


class Block(ShortConvBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        sizes, act = cfg.sizes, cfg.hidden_act
        if layer < cfg.num_dense_layers:
            mlp: nnx.Module = GatedMLP(sizes, act, bias=False, rngs=rngs)
        else:
            gate = Router(
                sizes,
                cfg.chosen,
                score="sigmoid",
                corrected=cfg.use_expert_bias,
                normalize=cfg.norm_topk_prob,
                eps=1e-6,
                scale=cfg.routed_scaling_factor,
                rngs=rngs,
            )
            mlp = MoE(gate, Experts(sizes, act, rngs=rngs))
        super().__init__(cfg, layer, mlp, rngs)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


MOE, MLP = "model.layers.{i}.feed_forward.", "layers.{i}.mlp."
STATE = SHORT_CONV_STATE
WEIGHTS = (
    embedding("model.embed_tokens"),
    *LFM2_LAYER,
    router(MOE + "gate", MLP + "gate"),
    correction(MOE + "expert_bias", MLP + "gate"),
    *experts(MOE + "experts", MLP + "experts", gate="w1", up="w3", down="w2"),
    *stacked_experts(MOE + "experts.gate_up_proj", MOE + "experts.down_proj", MLP + "experts"),
    rms_norm("model.embedding_norm", "norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
