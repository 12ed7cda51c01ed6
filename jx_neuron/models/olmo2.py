"""OLMo 2 (OLMo Team, arXiv:2501.00656): norms of what sublayers give, and of whole queries and keys.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/olmo2/modeling_olmo2.py
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, heads_rms_norm, key_head_numbers, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, HeadsRMSNorm, Linear, Linears, RMSNorm, head_copies
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


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

    MODEL_TYPE: ClassVar[str] = "olmo2"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.q_norm, self.k_norm = HeadsRMSNorm(n, h, cfg.rms_norm_eps), HeadsRMSNorm(k, h, cfg.rms_norm_eps)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.act = ACT[cfg.hidden_act]

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Rotation, copies_k: Array
    ) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(x_btd)
        q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh, copies_k)
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at)
        x_btd = x_btd + self.post_attention_layernorm(self.o_proj(a_btnh))
        gate_btf, up_btf = self.gate_up(x_btd)
        return x_btd + self.post_feedforward_layernorm(self.down_proj(self.act(gate_btf) * up_btf)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)
        self.number_k = nnx.Param(jnp.zeros((cfg.sizes["k"],)))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return self.rope(at), head_copies(self.number_k[...])


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    key_head_numbers("number_k"),
    *attention(HF + "self_attn.", OURS),
    heads_rms_norm(HF + "self_attn.q_norm", OURS + "q_norm", "n"),
    heads_rms_norm(HF + "self_attn.k_norm", OURS + "k_norm", "k"),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    rms_norm(HF + "post_feedforward_layernorm", OURS + "post_feedforward_layernorm"),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
