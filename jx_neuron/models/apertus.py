"""Apertus (Swiss AI, arXiv:2509.14233).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/apertus/modeling_apertus.py
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, column_parallel, embedding, rms_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's ApertusConfig."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "xielu"
    max_position_embeddings: int = 65536
    rms_norm_eps: float = 1e-5
    rope_theta: float = 12000000.0
    attention_bias: bool = False

    MODEL_TYPE: ClassVar[str] = "apertus"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    ACT: ClassVar[Mapping[str, Callable[[Array], Array] | None]] = {**ACT, "xielu": None}
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {
        "rope_type": "llama3",
        "rope_theta": 12000000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"one": 1}


class XIELU(nnx.Module):
    """α₊x² + βx where x > 0, else α₋(eˣ - 1 - x) + βx, with learned α (Huang and Schlag, arXiv:2411.13010)."""

    def __init__(self) -> None:
        self.alpha_p, self.alpha_n = nnx.Param(jnp.zeros(1)), nnx.Param(jnp.zeros(1))
        self.beta, self.eps = nnx.Param(jnp.zeros(())), nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        beta = self.beta[...]
        alpha_p, alpha_n = jax.nn.softplus(self.alpha_p[...]), beta + jax.nn.softplus(self.alpha_n[...])
        negative = (jnp.expm1(jnp.minimum(x, self.eps[...])) - x) * alpha_n
        return jnp.where(x > 0, alpha_p * x * x, negative) + beta * x


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.q_norm, self.k_norm = RMSNorm(h, cfg.rms_norm_eps), RMSNorm(h, cfg.rms_norm_eps)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.feedforward_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.up_proj = Linear((d,), (f,), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act_fn = XIELU() if cfg.hidden_act == "xielu" else ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.attention_layernorm(x_btd))
        q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh)
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at)
        x_btd = x_btd + self.o_proj(a_btnh)
        m_btf = self.act_fn(self.up_proj(self.feedforward_layernorm(x_btd)))
        return x_btd + self.down_proj(m_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "attention_layernorm", OURS + "attention_layernorm"),
    *attention(HF + "self_attn.", OURS),
    rms_norm(HF + "self_attn.q_norm", OURS + "q_norm", "h"),
    rms_norm(HF + "self_attn.k_norm", OURS + "k_norm", "h"),
    rms_norm(HF + "feedforward_layernorm", OURS + "feedforward_layernorm"),
    *column_parallel(HF + "mlp.up_proj", OURS + "up_proj", "f", bias=False),
    *row_parallel(HF + "mlp.down_proj", OURS + "down_proj", "f", bias=False),
    W(HF + "mlp.act_fn.alpha_p", OURS + "act_fn.alpha_p", "one -> one"),
    W(HF + "mlp.act_fn.alpha_n", OURS + "act_fn.alpha_n", "one -> one"),
    W(HF + "mlp.act_fn.beta", OURS + "act_fn.beta", "->"),
    W(HF + "mlp.act_fn.eps", OURS + "act_fn.eps", "->"),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
