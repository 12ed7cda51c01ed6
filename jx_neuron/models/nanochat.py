"""nanochat (Karpathy, 2025, https://github.com/karpathy/nanochat): norms without parameters, q/k norms after RoPE.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/nanochat/modeling_nanochat.py
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, column_parallel, embedding, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's NanoChatConfig."""

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 8192
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "relu2"
    attention_bias: bool = False
    final_logit_softcapping: float | None = 15.0

    MODEL_TYPE: ClassVar[str] = "nanochat"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.norm = RMSNorm(d, cfg.rms_norm_eps, affine=False)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.fc1 = Linear((d,), (f,), bias=False, rngs=rngs)
        self.fc2 = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.norm(x_btd))
        q_btnh, k_btkh = self.norm(rope_half(q_btnh, by)), self.norm(rope_half(k_btkh, by))
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at)
        x_btd = x_btd + self.o_proj(a_btnh)
        return x_btd + self.fc2(self.act(self.fc1(self.norm(x_btd)))), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, affine=False)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)
        self.soft_cap = cfg.final_logit_softcapping

    def embed(self, tokens_bt: Array) -> Array:
        return self.norm(super().embed(tokens_bt))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        cos_btr, sin_btr = self.rope(at)
        return (Rotation(cos_btr, -sin_btr),)  # the other way round than Llama

    def logits(self, x_btd: Array) -> Array:
        logits_btv = super().logits(x_btd)
        return logits_btv if self.soft_cap is None else self.soft_cap * jnp.tanh(logits_btv / self.soft_cap)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *attention(HF + "self_attn.", OURS),
    *column_parallel(HF + "mlp.fc1", OURS + "fc1", "f", bias=False),
    *row_parallel(HF + "mlp.fc2", OURS + "fc2", "f", bias=False),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
