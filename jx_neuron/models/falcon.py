"""Falcon (Almazrouei et al., arXiv:2311.16867).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/falcon/modeling_falcon.py
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import alibi, attention, embedding, layer_norm, mlp
from jx_neuron.nn.attention import alibi_bias
from jx_neuron.nn.layers import ACT, LayerNorm
from jx_neuron.nn.rope import Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention


@dataclass(frozen=True)
class Config(RopeConfig):
    """HF's FalconConfig."""

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float = 1e-5
    num_kv_heads: int | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    tie_word_embeddings: bool = True

    MODEL_TYPE = "falcon"
    COMPLETE = True
    LAYERS_ALIKE = True
    ALIASES: ClassVar[Mapping[str, str]] = {"n_embed": "hidden_size"}
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[Mapping[str, Any]] = {"apply_residual_connection_post_layernorm": False}

    def __post_init__(self) -> None:
        one_of("falcon", "activation", self.activation, ACT)
        n, k, new = self.num_attention_heads, self.sizes["k"], self.new_decoder_architecture
        divisible("falcon", "hidden_size", self.hidden_size, "num_attention_heads", n)
        divisible("falcon", "num_attention_heads", n, "num_kv_heads", k)
        norms = self.num_ln_in_parallel_attn
        legal = norms != 2 and k == (1 if self.multi_query else n)
        if not (self.parallel_attn if new else legal) or norms not in (None, 1, 2):
            raise ConfigError(
                f"falcon: num_ln_in_parallel_attn={norms} and num_kv_heads={k} are not supported here; legal are, with "
                f"new_decoder_architecture and parallel_attn, null, 1 or 2, and otherwise null or 1, with {n} heads"
            )
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k = 1 if self.multi_query and not self.new_decoder_architecture else self.num_kv_heads or n
        f = 4 * d if self.ffn_hidden_size is None else self.ffn_hidden_size
        return dict(d=d, n=n, k=k, h=d // n, f=f, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps = cfg.hidden_size, cfg.layer_norm_epsilon
        self.two_norms = cfg.new_decoder_architecture and cfg.num_ln_in_parallel_attn != 1
        if self.two_norms:
            self.ln_attn, self.ln_mlp = LayerNorm(d, eps), LayerNorm(d, eps)
        else:
            self.input_layernorm = LayerNorm(d, eps)
        self.post_attention_layernorm = None if cfg.parallel_attn else LayerNorm(d, eps)
        self.self_attention = Attention(cfg.sizes, bias=cfg.bias, rngs=rngs)
        self.mlp = MLP(cfg.sizes, cfg.activation, bias=cfg.bias, rngs=rngs)

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Rotation | None, bias_ns: Array | None
    ) -> tuple[Array, LayerState]:
        h_btd = self.ln_attn(x_btd) if self.two_norms else self.input_layernorm(x_btd)
        a_btd, state = self.self_attention(h_btd, state, at, by, bias_ns=bias_ns)
        y_btd = x_btd + a_btd
        if self.two_norms:
            h_btd = self.ln_mlp(x_btd)
        elif self.post_attention_layernorm is not None:
            h_btd = self.post_attention_layernorm(y_btd)
        return y_btd + self.mlp(h_btd), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), norm, rngs)
        self.slopes = nnx.Param(jnp.zeros((cfg.sizes["n"],))) if cfg.alibi else None
        self.rope, self.scale = cfg.rope, 1 / math.sqrt(cfg.sizes["h"])

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        if self.slopes is None:
            return self.rope(at), None
        # HF rounds the bias to bfloat16, and multiplies it by the scale of scores
        return None, alibi_bias(self.slopes[...], at, jnp.bfloat16).astype(jnp.float32) * self.scale


LAYER = "transformer.h.{i}."
NORMS = ("ln_attn", "ln_mlp", "input_layernorm", "post_attention_layernorm")
WEIGHTS = (
    embedding("transformer.word_embeddings", "embed_tokens"),
    alibi("slopes"),
    *(row for name in NORMS for row in layer_norm(LAYER + name)),
    *attention(LAYER + "self_attention", grouped="query_key_value", out="dense"),
    *mlp(LAYER + "mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *layer_norm("transformer.ln_f", "norm"),
    embedding("lm_head"),
)

INV_FREQ = r"h\.\d+\.self_attention\.(maybe_)?rotary(_emb)?\.inv_freq"  # older checkpoints carry it
IGNORE = (INV_FREQ, Copy("lm_head.weight", of="transformer.word_embeddings.weight"))
