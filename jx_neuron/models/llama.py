"""Llama (Touvron et al., arXiv:2302.13971, arXiv:2307.09288; Llama Team, arXiv:2407.21783).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.errors import ConfigError
from jx_neuron.nn.cache import Cache, LayerKV
from jx_neuron.nn.layers import ACT, Embedding, Linear, Linears, RMSNorm, Span, attend, through
from jx_neuron.nn.rope import RopeScaling, Rotation, rope_half


@dataclass(frozen=True)
class Config(HFConfig):
    """HF's LlamaConfig, with the RoPE fields as transformers 5 writes them and as older ones did."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 10000.0
    original_max_position_embeddings: int | None = None

    MODEL_TYPE: ClassVar[str] = "llama"
    COMPLETE: ClassVar[bool] = True
    # pretraining_tp: the same sums, in as many parts
    INERT: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout is_llama_config max_sequence_length pretraining_tp unsloth_version".split()
    )
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[Mapping[str, Any]] = {"rope_interleaved": False}

    def __post_init__(self) -> None:
        one_of("llama", "hidden_act", self.hidden_act, ACT)
        n, k, h = (self.sizes[c] for c in "nkh")
        if self.head_dim is None:
            divisible("llama", "hidden_size", self.hidden_size, "num_attention_heads", n)
        divisible("llama", "num_attention_heads", n, "num_key_value_heads", k)
        if h % 2:
            raise ConfigError(f"llama: the head size {h} is odd, and RoPE rotates pairs; set an even head_dim")
        if self.rope_scaling and self.rope_parameters and self.rope_scaling != self.rope_parameters:
            raise ConfigError("llama: rope_scaling and rope_parameters differ; keep the one that is meant")
        _ = self.rope

    @property
    def rope(self) -> RopeScaling:
        return RopeScaling(
            self.rope_scaling or self.rope_parameters or {},
            self.sizes["h"],
            self.max_position_embeddings,
            self.rope_theta,
            self.original_max_position_embeddings,
        )

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k = n if self.num_key_value_heads is None else self.num_key_value_heads
        h = d // n if self.head_dim is None else self.head_dim
        return dict(d=d, n=n, k=k, h=h, f=self.intermediate_size, v=self.vocab_size)

    @property
    def max_positions(self) -> None:
        return None

    @property
    def unread(self) -> list[str]:
        return [f"rope_parameters.{key}" for key in self.rope.unread]

    @property
    def rotations(self) -> tuple[int, bool] | None:
        return self.rope.rotations


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=cfg.mlp_bias, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=cfg.mlp_bias, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, kv: LayerKV, at: Span, by: Rotation) -> tuple[Array, LayerKV]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        a_btnh, kv = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, kv, at)
        x_btd = x_btd + self.o_proj(a_btnh)
        gate_btf, up_btf = self.gate_up(self.post_attention_layernorm(x_btd))
        return x_btd + self.down_proj(self.act(gate_btf) * up_btf), kv


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, cache: Cache, at: Span) -> tuple[Array, Cache]:
        x_btd, by = self.embed_tokens(tokens_bt), self.rope(at)
        x_btd, cache = through(self.layers, x_btd, cache, at, by)
        return self.norm(x_btd), cache

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)


LAYER = "model.layers.{i}."
WEIGHTS = (
    W("model.embed_tokens.weight", "embed_tokens.embedding", "v d -> v d", P("tp", None)),
    W(LAYER + "input_layernorm.weight", "layers.{i}.input_layernorm.scale", "d -> d"),
    W(LAYER + "self_attn.q_proj.weight", "layers.{i}.qkv.q_proj.kernel", "(n h) d -> d n h", P(None, "tp", None)),
    W(LAYER + "self_attn.q_proj.bias", "layers.{i}.qkv.q_proj.bias", "(n h) -> n h", P("tp", None)),
    W(LAYER + "self_attn.k_proj.weight", "layers.{i}.qkv.k_proj.kernel", "(k h) d -> d k h", P(None, "tp", None)),
    W(LAYER + "self_attn.k_proj.bias", "layers.{i}.qkv.k_proj.bias", "(k h) -> k h", P("tp", None)),
    W(LAYER + "self_attn.v_proj.weight", "layers.{i}.qkv.v_proj.kernel", "(k h) d -> d k h", P(None, "tp", None)),
    W(LAYER + "self_attn.v_proj.bias", "layers.{i}.qkv.v_proj.bias", "(k h) -> k h", P("tp", None)),
    W(LAYER + "self_attn.o_proj.weight", "layers.{i}.o_proj.kernel", "d (n h) -> n h d", P("tp", None, None)),
    W(LAYER + "self_attn.o_proj.bias", "layers.{i}.o_proj.bias", "d -> d"),
    W(LAYER + "post_attention_layernorm.weight", "layers.{i}.post_attention_layernorm.scale", "d -> d"),
    W(LAYER + "mlp.gate_proj.weight", "layers.{i}.gate_up.gate_proj.kernel", "f d -> d f", P(None, "tp")),
    W(LAYER + "mlp.gate_proj.bias", "layers.{i}.gate_up.gate_proj.bias", "f -> f", P("tp")),
    W(LAYER + "mlp.up_proj.weight", "layers.{i}.gate_up.up_proj.kernel", "f d -> d f", P(None, "tp")),
    W(LAYER + "mlp.up_proj.bias", "layers.{i}.gate_up.up_proj.bias", "f -> f", P("tp")),
    W(LAYER + "mlp.down_proj.weight", "layers.{i}.down_proj.kernel", "d f -> f d", P("tp", None)),
    W(LAYER + "mlp.down_proj.bias", "layers.{i}.down_proj.bias", "d -> d"),
    W("model.norm.weight", "norm.scale", "d -> d"),
    W("lm_head.weight", "lm_head.embedding", "v d -> v d", P("tp", None)),
)

# inverse frequencies that older checkpoints carry, and the head where it is tied
IGNORE = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", Copy("lm_head.weight", of="model.embed_tokens.weight"))
