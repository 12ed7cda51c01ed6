"""MPT (MosaicML NLP Team, 2023, https://www.databricks.com/blog/mpt-7b).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/mpt/modeling_mpt.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import INERT, HFConfig, divisible, in_range
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.models.rows import alibi, attention, embedding, layer_norm, mlp
from jx_neuron.nn.attention import alibi_bias
from jx_neuron.nn.layers import LayerNorm
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import MLP, Attention
from jx_neuron.util.arguments import shown

# fields of attn_config that MosaicML's code honours, and the values that HF's has in any case; and those of training
ALWAYS: Mapping[str, Any] = {
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "is_encoder_decoder": False,
    "prefix_lm": False,
    "qk_ln": False,
}
TRAINING = frozenset({"attn_impl", "attn_pdrop", "attn_uses_sequence_id"})
NUMBERS = 1.1754944e-38, 3.4028234e38


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's MptConfig."""

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    max_seq_len: int = 2048
    vocab_size: int = 50368
    layer_norm_epsilon: float = 1e-5
    attn_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    MODEL_TYPE = "mpt"
    COMPLETE = True
    LAYERS_ALIKE = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    INERT = frozenset("embedding_fraction init_config init_device learned_pos_emb norm_type verbose".split())
    # MosaicML's code honours these, and HF's has these values in any case
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = dict(expansion_ratio=(4,), logit_scale=(None,), no_bias=(True,))

    def __post_init__(self) -> None:
        divisible("mpt", "d_model", self.d_model, "n_heads", self.n_heads)
        for key, value in (self.attn_config or {}).items():
            if key in ALWAYS and value != ALWAYS[key]:
                raise ConfigError(f"mpt: attn_config: {key}={shown(value)} is not supported, only {ALWAYS[key]!r}")
            if key in ("clip_qkv", "softmax_scale") and value is not None:
                in_range(f"mpt: attn_config: {key}", value, *NUMBERS)

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.d_model, self.n_heads
        return dict(d=d, n=n, k=n, h=d // n, f=4 * d, v=self.vocab_size)

    @property
    def trained_positions(self) -> int:
        return self.max_seq_len

    @property
    def unread(self) -> list[str]:
        known = {"clip_qkv", "softmax_scale", *ALWAYS, *TRAINING, *INERT}
        return [f"attn_config.{key}" for key in self.attn_config or {} if key not in known]


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, eps, options = cfg.d_model, cfg.layer_norm_epsilon, cfg.attn_config or {}
        clip, scale = options.get("clip_qkv"), options.get("softmax_scale")
        self.norm_1 = LayerNorm(d, eps, bias=False)
        self.attn = Attention(cfg.sizes, bias=False, clip=clip, scale=scale, rngs=rngs)
        self.norm_2 = LayerNorm(d, eps, bias=False)
        self.ffn = MLP(cfg.sizes, "gelu", bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, bias_ns: Array) -> tuple[Array, LayerState]:
        a_btd, state = self.attn(self.norm_1(x_btd), state, at, bias_ns=bias_ns)
        x_btd = x_btd + a_btd
        return x_btd + self.ffn(self.norm_2(x_btd)), state


class Model(CausalLM):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.d_model, cfg.layer_norm_epsilon, bias=False)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), norm, rngs)
        self.slopes = nnx.Param(jnp.zeros((cfg.sizes["n"],)))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return (alibi_bias(self.slopes[...], at),)


LAYER = "transformer.blocks.{i}."
WEIGHTS = (
    embedding("transformer.wte", "embed_tokens"),
    alibi("slopes"),
    *layer_norm(LAYER + "norm_1", bias=False),
    *attention(LAYER + "attn", fused="Wqkv", out="out_proj", bias=False),
    *layer_norm(LAYER + "norm_2", bias=False),
    *mlp(LAYER + "ffn", bias=False),
    *layer_norm("transformer.norm_f", "norm", bias=False),
    embedding("lm_head"),
)

# the head where it is tied
IGNORE = (Copy("lm_head.weight", of="transformer.wte.weight"),)
