"""OLMo 2 (OLMo Team, arXiv:2501.00656): norms of what sublayers give, and of whole queries and keys.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/olmo2/modeling_olmo2.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, HeadsNormModel, LlamaLikeConfig
from jx_neuron.models.rows import attention, embedding, gated_mlp, heads_rms_norm, key_head_numbers, rms_norm
from jx_neuron.nn.layers import HeadsRMSNorm, RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import GatedMLP, HeadsNormAttention


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Olmo2Config."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5

    MODEL_TYPE = "olmo2"
    COMPLETE = True
    LAYERS_ALIKE = True


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h = (cfg.sizes[c] for c in "dnkh")
        eps = cfg.rms_norm_eps
        q_norm, k_norm = HeadsRMSNorm(n, h, eps), HeadsRMSNorm(k, h, eps)
        self.self_attn = HeadsNormAttention(cfg.sizes, bias=cfg.attention_bias, q_norm=q_norm, k_norm=k_norm, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: tuple[Rotation, Array]
    ) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(x_btd, state, at, by)
        x_btd = x_btd + self.post_attention_layernorm(a_btd)
        return x_btd + self.post_feedforward_layernorm(self.mlp(x_btd)), state


class Model(HeadsNormModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    key_head_numbers("number_k"),
    *attention(LAYER + "self_attn"),
    heads_rms_norm(LAYER + "self_attn.q_norm", heads="n"),
    heads_rms_norm(LAYER + "self_attn.k_norm", heads="k"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm(LAYER + "post_feedforward_layernorm"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
