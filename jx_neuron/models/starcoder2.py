"""StarCoder2 (Lozhkov et al., arXiv:2402.19173).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/starcoder2/modeling_starcoder2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel, SlidingWindowConfig
from jx_neuron.models.rows import attention, embedding, layer_norm, mlp
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(SlidingWindowConfig, GroupedQueryConfig):
    """HF's Starcoder2Config."""

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int = 2
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    tie_word_embeddings: bool = True

    MODEL_TYPE = "starcoder2"
    COMPLETE = True
    LAYERS_ALIKE = True
    USUAL: ClassVar[Mapping[str, Any]] = {"mlp_type": "default", "norm_type": "layer_norm"}


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.norm_epsilon
        self.input_layernorm = LayerNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.use_bias, window=cfg.window, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, eps)
        self.mlp = MLP(cfg.sizes, cfg.hidden_act, bias=cfg.use_bias, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.norm_epsilon)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    *layer_norm(LAYER + "post_attention_layernorm"),
    *mlp(LAYER + "mlp", up="c_fc", down="c_proj"),
    *layer_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
