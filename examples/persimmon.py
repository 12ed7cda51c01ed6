"""A decoder of your own: Persimmon (Elsen et al., 2023), registered without touching the package.

The command line, with this decoder among those it knows: python examples/persimmon.py sample ./persimmon-8b "Once upon"
"""

import sys
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron import register
from jx_neuron.checkpoint import Copy, HFConfig, W, one_of
from jx_neuron.cli import main
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear
from jx_neuron.nn.rope import RopeScaling, Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(HFConfig):
    vocab_size: int = 262144
    hidden_size: int = 4096
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = True
    tie_word_embeddings: bool = False
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None  # where transformers 5 writes the two above

    MODEL_TYPE = "persimmon"

    def __post_init__(self) -> None:
        one_of("persimmon", "hidden_act", self.hidden_act, ACT)

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        return dict(d=d, n=n, k=n, h=d // n, f=self.intermediate_size, v=self.vocab_size, c=3)

    @property
    def rope(self) -> RopeScaling:
        limit, part, theta = self.max_position_embeddings, self.partial_rotary_factor, self.rope_theta
        return RopeScaling(self.rope_parameters or {}, self.sizes["h"], limit, theta, partial_rotary_factor=part)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.query_key_value = Linear((d,), (3, n, h), bias=True, rngs=rngs)
        self.q_layernorm = LayerNorm(h, cfg.layer_norm_eps) if cfg.qk_layernorm else None
        self.k_layernorm = LayerNorm(h, cfg.layer_norm_eps) if cfg.qk_layernorm else None
        self.dense = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.dense_h_to_4h = Linear((d,), (f,), bias=True, rngs=rngs)
        self.dense_4h_to_h = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        qkv_btcnh = self.query_key_value(self.input_layernorm(x_btd))
        q_btnh, k_btnh, v_btnh = (qkv_btcnh[:, :, i] for i in range(3))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_btnh, k_btnh = self.q_layernorm(q_btnh), self.k_layernorm(k_btnh)
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btnh, by), v_btnh, state, at)
        x_btd = x_btd + self.dense(a_btnh)
        m_btf = self.act(self.dense_h_to_4h(self.post_attention_layernorm(x_btd)))
        return x_btd + self.dense_4h_to_h(m_btf), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, rngs) for _ in range(cfg.layers))
        self.final_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed_tokens(tokens_bt), state, at, self.rope(at))
        return self.final_layernorm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)


L, O = "model.layers.{i}.", "layers.{i}."  # noqa: E741
ENDS = (("weight", "scale"), ("bias", "bias"))
NORMS = (O + "input_layernorm", O + "post_attention_layernorm", "final_layernorm")
WEIGHTS = (
    W("model.embed_tokens.weight", "embed_tokens.embedding", "v d -> v d", P("tp", None)),
    *(W(f"model.{norm}.{a}", f"{norm}.{b}", "d -> d") for norm in NORMS for a, b in ENDS),
    *(W(f"{L}self_attn.{x}_layernorm.{a}", f"{O}{x}_layernorm.{b}", "h -> h") for x in "qk" for a, b in ENDS),
    W(L + "self_attn.query_key_value.weight", O + "query_key_value.kernel", "(n c h) d->d c n h", P(None, None, "tp")),
    W(L + "self_attn.query_key_value.bias", O + "query_key_value.bias", "(n c h) -> c n h", P(None, "tp")),
    W(L + "self_attn.dense.weight", O + "dense.kernel", "d (n h) -> n h d", P("tp")),
    W(L + "self_attn.dense.bias", O + "dense.bias", "d -> d"),
    W(L + "mlp.dense_h_to_4h.weight", O + "dense_h_to_4h.kernel", "f d -> d f", P(None, "tp")),
    W(L + "mlp.dense_h_to_4h.bias", O + "dense_h_to_4h.bias", "f -> f", P("tp")),
    W(L + "mlp.dense_4h_to_h.weight", O + "dense_4h_to_h.kernel", "d f -> f d", P("tp", None)),
    W(L + "mlp.dense_4h_to_h.bias", O + "dense_4h_to_h.bias", "d -> d"),
    W("lm_head.weight", "lm_head.embedding", "v d -> v d", P("tp", None)),
)
BUFFERS = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
IGNORE = (BUFFERS, Copy("lm_head.weight", of="model.embed_tokens.weight"))
register("persimmon", sys.modules[__name__])

if __name__ == "__main__":
    main()
