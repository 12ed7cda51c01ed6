"""OLMo (Groeneveld et al., arXiv:2402.00838): norms without parameters, and clipped queries, keys and values.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/olmo/modeling_olmo.py
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, LayerNorm, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions

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

    MODEL_TYPE: ClassVar[str] = "olmo"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = LayerNorm(d, EPS, affine=False)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, EPS, affine=False)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act, self.clip = ACT[cfg.hidden_act], cfg.clip_qkv

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        qkv = self.qkv(self.input_layernorm(x_btd))
        if self.clip is not None:
            qkv = [jnp.clip(x, -self.clip, self.clip) for x in qkv]
        q_btnh, k_btkh, v_btkh = qkv
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at)
        x_btd = x_btd + self.o_proj(a_btnh)
        gate_btf, up_btf = self.gate_up(self.post_attention_layernorm(x_btd))
        return x_btd + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, EPS, affine=False)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *attention(HF + "self_attn.", OURS),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
