"""Qwen3.5 with experts, its text model (Qwen Team, 2026): Gated DeltaNet in most layers, gated attention in the others.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_5_moe/modeling_qwen3_5_moe.py
"""

from dataclasses import dataclass, field

from flax import nnx

from jx_neuron.models.delta_net import DELTA_NET_STATE, DeltaNetBlock, DeltaNetConfig, delta_net_layer
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.mixture import TRAINING, ExpertsConfig, qwen_experts
from jx_neuron.models.rows import embedding, rms_norm
from jx_neuron.nn.experts import Experts, MoE, Router, SharedExpert
from jx_neuron.nn.layers import RMSNorm


@dataclass(frozen=True)
class Config(ExpertsConfig, DeltaNetConfig):
    """HF's Qwen3_5MoeTextConfig; its only MLP is the shared expert."""

    vocab_size: int = 248320
    hidden_size: int = 2048
    intermediate_size: int = field(default=512, metadata={"hf": "shared_expert_intermediate_size"})
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 2
    max_position_embeddings: int = 32768
    num_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 512

    MODEL_TYPE = "qwen3_5_moe_text"
    COMPLETE = True
    # as in files of the Hub: what Qwen3-Next's config has besides
    INERT = DeltaNetConfig.INERT | TRAINING | {"intermediate_size", "mlp_only_layers", "norm_topk_prob"}

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | dict(one=1)


class Block(DeltaNetBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        gate = Router(cfg.sizes, cfg.chosen, normalize=True, rngs=rngs)
        experts = Experts(cfg.sizes, cfg.hidden_act, rngs=rngs)
        shared = SharedExpert(cfg.sizes, cfg.hidden_act, rngs=rngs)
        super().__init__(cfg, layer, MoE(gate, experts, shared), rngs)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, norm=norm)


STATE = DELTA_NET_STATE
WEIGHTS = (
    embedding("model.embed_tokens"),
    *delta_net_layer(),
    *qwen_experts("model.layers.{i}.mlp", "layers.{i}.mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = (*EXTRA_TENSORS, r"mtp\..*")
