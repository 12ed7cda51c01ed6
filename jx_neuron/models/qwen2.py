"""Qwen2 and Qwen2.5 (Qwen Team, arXiv:2407.10671, arXiv:2412.15115).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2/modeling_qwen2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel, MaxWindowLayersConfig
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(MaxWindowLayersConfig, LlamaLikeConfig):
    """HF's Qwen2Config."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768

    MODEL_TYPE = "qwen2"
    COMPLETE = True
    LAYERS_ALIKE = True
    USUAL: ClassVar[Mapping[str, Any]] = {**LlamaLikeConfig.USUAL, "use_mrope": False}


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=True, out_bias=False, window=cfg.windows[layer], rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", out_bias=False),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
