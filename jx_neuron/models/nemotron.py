"""Nemotron-4 and Minitron (Parmar et al., arXiv:2402.16819; Muralidharan et al., arXiv:2407.14679).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/nemotron/modeling_nemotron.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, layer_norm, mlp
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(GroupedQueryConfig):
    """HF's NemotronConfig."""

    vocab_size: int = 256000
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 32
    num_attention_heads: int = 48
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    mlp_bias: bool = False

    MODEL_TYPE = "nemotron"
    COMPLETE = True
    LAYERS_ALIKE = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.norm_eps
        self.input_layernorm = LayerNorm(d, eps, offset=1)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, eps, offset=1)
        self.mlp = MLP(cfg.sizes, cfg.hidden_act, bias=cfg.mlp_bias, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    *layer_norm(LAYER + "post_attention_layernorm"),
    *mlp(LAYER + "mlp"),
    *layer_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
