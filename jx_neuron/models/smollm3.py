"""SmolLM3 (Hugging Face, 2025): Llama of which every fourth layer has no positions (Yang et al., arXiv:2501.18795).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/smollm3/modeling_smollm3.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    FULL,
    SLIDING,
    LayerTypesConfig,
    LlamaLikeConfig,
    LlamaLikeModel,
    NoRopeLayersConfig,
)
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(NoRopeLayersConfig, LayerTypesConfig, LlamaLikeConfig):
    """HF's SmolLM3Config."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2000000.0
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True

    MODEL_TYPE = "smollm3"
    COMPLETE = True
    INERT = frozenset({"max_window_layers", "pretraining_tp"})

    @property
    def usual_types(self) -> list[str]:
        windowed = self.use_sliding_window and self.sliding_window is not None
        return [SLIDING if windowed and not rotates else FULL for rotates in self.rotates]


class Block(nnx.Module):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, window=cfg.windows[layer], rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=cfg.mlp_bias, rngs=rngs)
        self.rotates = cfg.rotates[layer]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by if self.rotates else None)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
