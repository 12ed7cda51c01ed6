"""Qwen3.5, its dense text model (Qwen Team, 2026): Gated DeltaNet in most layers, gated attention in the others.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_5/modeling_qwen3_5.py
"""

from dataclasses import dataclass

from flax import nnx

from jx_neuron.models.delta_net import DELTA_NET_STATE, DeltaNetBlock, DeltaNetConfig, delta_net_layer
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel
from jx_neuron.models.rows import embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.sublayers import GatedMLP


@dataclass(frozen=True)
class Config(DeltaNetConfig):
    """HF's Qwen3_5TextConfig."""

    vocab_size: int = 248320
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768

    MODEL_TYPE = "qwen3_5_text"
    COMPLETE = True
    INERT = DeltaNetConfig.INERT | {"mlp_only_layers"}


class Block(DeltaNetBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        super().__init__(cfg, layer, GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs), rngs)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, norm=norm)


STATE = DELTA_NET_STATE
WEIGHTS = (
    embedding("model.embed_tokens"),
    *delta_net_layer(),
    *gated_mlp("model.layers.{i}.mlp", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = (*EXTRA_TENSORS, r"mtp\..*")
