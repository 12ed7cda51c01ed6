"""OLMo (Groeneveld et al., arXiv:2402.00838): norms without parameters, and clipped queries, keys and values.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/olmo/modeling_olmo.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP

EPS = 1e-5  # OlmoLayerNorm's


@dataclass(frozen=True)
class Config(GroupedQueryConfig):
    """HF's OlmoConfig."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    attention_bias: bool = False
    clip_qkv: float | None = None

    MODEL_TYPE = "olmo"
    COMPLETE = True
    LAYERS_ALIKE = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d = cfg.hidden_size
        self.input_layernorm = LayerNorm(d, EPS, affine=False)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, clip=cfg.clip_qkv, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, EPS, affine=False)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, EPS, affine=False)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *attention(LAYER + "self_attn"),
    *gated_mlp(LAYER + "mlp", bias=False),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
