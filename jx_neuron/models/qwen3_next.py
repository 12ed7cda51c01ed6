"""Qwen3-Next (Qwen Team, 2025): Gated DeltaNet in most layers, gated attention in the others, and many small experts.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_next/modeling_qwen3_next.py
"""

from dataclasses import dataclass

from flax import nnx

from jx_neuron.models.delta_net import DELTA_NET_STATE, DeltaNetBlock, DeltaNetConfig, delta_net_layer
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, SharedExpertConfig, qwen_experts
from jx_neuron.models.rows import embedding, gated_mlp, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router, SharedExpert
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.sublayers import GatedMLP


@dataclass(frozen=True)
class Config(SharedExpertConfig, DeltaNetConfig):
    """HF's Qwen3NextConfig."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 2
    max_position_embeddings: int = 32768
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True

    MODEL_TYPE = "qwen3_next"
    COMPLETE = True
    INERT = DeltaNetConfig.INERT | TRAINING | {"use_sliding_window"}


class Block(DeltaNetBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        sizes, act = cfg.sizes_of(layer), cfg.hidden_act
        mlp: nnx.Module = GatedMLP(sizes, act, bias=False, rngs=rngs)
        if cfg.has_experts(layer):
            gate = Router(sizes, cfg.chosen, normalize=cfg.norm_topk_prob, rngs=rngs)
            mlp = MoE(gate, Experts(sizes, act, rngs=rngs), SharedExpert(sizes, act, rngs=rngs))
        super().__init__(cfg, layer, mlp, rngs)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, norm=norm)


LAYER = "model.layers.{i}."
STATE = DELTA_NET_STATE
WEIGHTS = (
    embedding("model.embed_tokens"),
    *delta_net_layer(grouped=True),
    *gated_mlp(LAYER + "mlp", bias=False),
    *qwen_experts(LAYER + "mlp", "layers.{i}.mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = (*EXTRA_TENSORS, r"mtp\..*")
