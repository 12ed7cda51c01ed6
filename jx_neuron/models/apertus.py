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
from jx_neuron.models.rows import attention, embedding, mlp, rms_norm
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


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

    MODEL_TYPE = "apertus"
    COMPLETE = True
    LAYERS_ALIKE = True
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
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        q_norm, k_norm = RMSNorm(h, eps), RMSNorm(h, eps)
        self.attention_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(cfg.sizes, bias=cfg.attention_bias, q_norm=q_norm, k_norm=k_norm, rngs=rngs)
        self.feedforward_layernorm = RMSNorm(d, eps)
        self.mlp = MLP(cfg.sizes, XIELU() if cfg.hidden_act == "xielu" else cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.attention_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.feedforward_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
ACT_FN, OURS = LAYER + "mlp.act_fn.", "layers.{i}.mlp.act_fn."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "attention_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "self_attn.q_norm", width="h"),
    rms_norm(LAYER + "self_attn.k_norm", width="h"),
    rms_norm(LAYER + "feedforward_layernorm"),
    *mlp(LAYER + "mlp", bias=False),
    W(ACT_FN + "alpha_p", OURS + "alpha_p", "one -> one"),
    W(ACT_FN + "alpha_n", OURS + "alpha_n", "one -> one"),
    W(ACT_FN + "beta", OURS + "beta", "->"),
    W(ACT_FN + "eps", OURS + "eps", "->"),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
