"""Helium (Kyutai, 2025).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/helium/modeling_helium.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention, GatedMLP


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's HeliumConfig."""

    vocab_size: int = 48000
    hidden_size: int = 2560
    intermediate_size: int = 7040
    num_hidden_layers: int = 24
    num_attention_heads: int = 20
    num_key_value_heads: int | None = 20
    head_dim: int | None = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-8
    rope_theta: float = 100000.0
    attention_bias: bool = False
    mlp_bias: bool = False

    MODEL_TYPE = "helium"
    COMPLETE = True
    LAYERS_ALIKE = True
    HEADS_FILL_WIDTH = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, out_bias=False, rope=rope_interleaved, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=cfg.mlp_bias, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", out_bias=False),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
