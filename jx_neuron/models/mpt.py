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
from jx_neuron.models.rows import alibi, attention, column_parallel, embedding, layer_norm, row_parallel
from jx_neuron.nn.attention import alibi_bias, attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Linear, Linears, through
from jx_neuron.nn.state import LayerState, Positions, State
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

    MODEL_TYPE: ClassVar[str] = "mpt"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    INERT: ClassVar[frozenset[str]] = frozenset(
        "emb_pdrop embedding_fraction init_config init_device learned_pos_emb norm_type resid_pdrop verbose".split()
    )
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
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.norm_1 = LayerNorm(d, cfg.layer_norm_epsilon, bias=False)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(n, h), v_proj=(n, h)), bias=False, rngs=rngs)
        self.out_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.norm_2 = LayerNorm(d, cfg.layer_norm_epsilon, bias=False)
        self.up_proj = Linear((d,), (f,), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT["gelu"]
        attention = cfg.attn_config or {}
        self.clip, self.scale = attention.get("clip_qkv"), attention.get("softmax_scale")

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, bias_ns: Array) -> tuple[Array, LayerState]:
        qkv = self.qkv(self.norm_1(x_btd))
        if self.clip is not None:
            qkv = [jnp.clip(x, -self.clip, self.clip) for x in qkv]
        q_btnh, k_btnh, v_btnh = qkv
        a_btnh, state = attend(q_btnh, k_btnh, v_btnh, state, at, self.scale, bias_ns=bias_ns)
        x_btd = x_btd + self.out_proj(a_btnh)
        return x_btd + self.down_proj(self.act(self.up_proj(self.norm_2(x_btd)))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, v = (cfg.sizes[c] for c in "dnv")
        self.wte = Embedding(v, d, rngs=rngs)
        self.slopes = nnx.Param(jnp.zeros((n,)))
        self.blocks = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.norm_f = LayerNorm(d, cfg.layer_norm_epsilon, bias=False)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(v, d, rngs=rngs)

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = through(self.blocks, self.wte(tokens_bt), state, at, alibi_bias(self.slopes[...], at))
        return self.norm_f(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.wte if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "transformer.blocks.{i}.", "blocks.{i}."
WEIGHTS = (
    embedding("transformer.wte", "wte"),
    alibi("slopes"),
    *layer_norm(HF + "norm_1", OURS + "norm_1", bias=False),
    *attention(HF + "attn.", OURS, out="out_proj", fused="Wqkv", bias=False),
    *layer_norm(HF + "norm_2", OURS + "norm_2", bias=False),
    *column_parallel(HF + "ffn.up_proj", OURS + "up_proj", "f", bias=False),
    *row_parallel(HF + "ffn.down_proj", OURS + "down_proj", "f", bias=False),
    *layer_norm("transformer.norm_f", "norm_f", bias=False),
    embedding("lm_head", "lm_head"),
)

# the head where it is tied
IGNORE = (Copy("lm_head.weight", of="transformer.wte.weight"),)
