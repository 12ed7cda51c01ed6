"""A decoder of one's own: GPT-NeoX (Black et al., arXiv:2204.06745), registered without touching the package.

The command line, with this decoder among those it knows: python examples/gpt_neox.py sample ./pythia-70m "Once upon"
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
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
    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    tie_word_embeddings: bool = False
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    rope_parameters: dict[str, Any] | None = None  # where transformers 5 writes the two above

    MODEL_TYPE = "gpt_neox"
    INERT = frozenset("attention_dropout attention_probs_dropout_prob classifier_dropout hidden_dropout".split())
    ONLY: ClassVar[dict[str, tuple[Any, ...]]] = {"attention_bias": (True,)}

    def __post_init__(self) -> None:
        one_of("gpt_neox", "hidden_act", self.hidden_act, ACT)

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        return dict(d=d, n=n, k=n, h=d // n, f=self.intermediate_size, v=self.vocab_size, c=3)

    @property
    def rope(self) -> RopeScaling:
        rope = {"partial_rotary_factor": self.rotary_pct, **(self.rope_parameters or {})}
        r = int(self.sizes["h"] * rope.pop("partial_rotary_factor"))
        return RopeScaling(rope, r, self.max_position_embeddings, self.rotary_emb_base)


def rotate(x_btnh: Array, by: Rotation) -> Array:
    r = 2 * by.cos_btr.shape[-1]
    return jnp.concatenate([rope_half(x_btnh[..., :r], by), x_btnh[..., r:]], axis=-1)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.query_key_value = Linear((d,), (3, n, h), bias=True, rngs=rngs)
        self.dense = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.dense_h_to_4h = Linear((d,), (f,), bias=True, rngs=rngs)
        self.dense_4h_to_h = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act, self.parallel = ACT[cfg.hidden_act], cfg.use_parallel_residual

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        qkv = self.query_key_value(self.input_layernorm(x_btd))
        a_btnh, state = attend(rotate(qkv[:, :, 0], by), rotate(qkv[:, :, 1], by), qkv[:, :, 2], state, at)
        y_btd = x_btd + self.dense(a_btnh)
        m_btf = self.act(self.dense_h_to_4h(self.post_attention_layernorm(x_btd if self.parallel else y_btd)))
        return y_btd + self.dense_4h_to_h(m_btf), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_in = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.embed_out = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, rngs) for _ in range(cfg.layers))
        self.final_layer_norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.cfg = cfg

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed_in(tokens_bt), state, at, self.cfg.rope(at))
        return self.final_layer_norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_in if self.embed_out is None else self.embed_out).attend(x_btd)


L, O = "gpt_neox.layers.{i}.", "layers.{i}."  # noqa: E741
NORMS = (O + "input_layernorm", O + "post_attention_layernorm", "final_layer_norm")
WEIGHTS = (
    W("gpt_neox.embed_in.weight", "embed_in.embedding", "v d -> v d", P("tp", None)),
    *(W(f"gpt_neox.{n}.{a}", f"{n}.{b}", "d -> d") for n in NORMS for a, b in (("weight", "scale"), ("bias", "bias"))),
    W(L + "attention.query_key_value.weight", O + "query_key_value.kernel", "(n c h) d->d c n h", P(None, None, "tp")),
    W(L + "attention.query_key_value.bias", O + "query_key_value.bias", "(n c h) -> c n h", P(None, "tp")),
    W(L + "attention.dense.weight", O + "dense.kernel", "d (n h) -> n h d", P("tp")),
    W(L + "attention.dense.bias", O + "dense.bias", "d -> d"),
    W(L + "mlp.dense_h_to_4h.weight", O + "dense_h_to_4h.kernel", "f d -> d f", P(None, "tp")),
    W(L + "mlp.dense_h_to_4h.bias", O + "dense_h_to_4h.bias", "f -> f", P("tp")),
    W(L + "mlp.dense_4h_to_h.weight", O + "dense_4h_to_h.kernel", "d f -> f d", P("tp", None)),
    W(L + "mlp.dense_4h_to_h.bias", O + "dense_4h_to_h.bias", "d -> d"),
    W("embed_out.weight", "embed_out.embedding", "v d -> v d", P("tp", None)),
)  # fmt: skip
BUFFERS = r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)"
IGNORE = (BUFFERS, Copy("embed_out.weight", of="gpt_neox.embed_in.weight"))
register("gpt_neox", sys.modules[__name__])

if __name__ == "__main__":
    main()
