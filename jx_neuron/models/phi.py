"""Phi (Gunasekar et al., arXiv:2306.11644; Li et al., arXiv:2309.05463).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/phi/modeling_phi.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeModel, MultiHeadConfig
from jx_neuron.models.rows import attention, embedding, head_bias, layer_norm, mlp
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(MultiHeadConfig):
    """HF's PhiConfig."""

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = False
    partial_rotary_factor: float = 0.5

    MODEL_TYPE = "phi"
    COMPLETE = True
    LAYERS_ALIKE = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.layer_norm_eps
        q_norm, k_norm = (LayerNorm(h, eps) if cfg.qk_layernorm else None for _ in "qk")
        self.input_layernorm = LayerNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=True, q_norm=q_norm, k_norm=k_norm, rngs=rngs)
        self.mlp = MLP(cfg.sizes, cfg.hidden_act, bias=True, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        a_btd, state = self.self_attn(h_btd, state, at, by)
        return x_btd + a_btd + self.mlp(h_btd), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm, head_bias=True)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    *layer_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn", out="dense"),
    *layer_norm(LAYER + "self_attn.q_layernorm", "layers.{i}.self_attn.q_norm", width="h"),
    *layer_norm(LAYER + "self_attn.k_layernorm", "layers.{i}.self_attn.k_norm", width="h"),
    *mlp(LAYER + "mlp", up="fc1", down="fc2"),
    *layer_norm("model.final_layernorm", "norm"),
    embedding("lm_head"),
    head_bias("lm_head", "lm_head_bias"),
)

IGNORE = EXTRA_TENSORS
