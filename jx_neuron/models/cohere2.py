"""Command R7B and Command A (Cohere, arXiv:2504.00698): windows and RoPE in three of four layers, no RoPE in the rest.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/cohere2/modeling_cohere2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LayerTypesConfig, LlamaLikeModel, full_every
from jx_neuron.models.rows import attention, embedding, gated_mlp, layer_norm
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(LayerTypesConfig, GroupedQueryConfig):
    """HF's Cohere2Config."""

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    logit_scale: float = 0.0625
    sliding_window: int | None = 4096
    sliding_window_pattern: int | None = None

    MODEL_TYPE = "cohere2"
    COMPLETE = True
    INERT = frozenset({"_sliding_window_pattern"})
    USUAL: ClassVar[Mapping[str, Any]] = {
        **GroupedQueryConfig.USUAL,
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    }

    @property
    def usual_types(self) -> list[str]:
        return full_every(self.sliding_window_pattern or 4, self.layers)


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        bias, window = cfg.attention_bias, cfg.windows[layer]
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        self.self_attn = Attention(cfg.sizes, bias=bias, rope=rope_interleaved, window=window, rngs=rngs)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.rotates = window is not None

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        a_btd, state = self.self_attn(h_btd, state, at, by if self.rotates else None)
        return x_btd + a_btd + self.mlp(h_btd), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, norm=norm)
        self.logit_scale = cfg.logit_scale

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) * self.logit_scale


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm", bias=False),
    *attention(LAYER + "self_attn"),
    *gated_mlp(LAYER + "mlp", bias=False),
    *layer_norm("model.norm", bias=False),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
