"""A decoder of one's own: GPT-NeoX (Black et al., arXiv:2204.06745), registered without touching the package.

Run it on a checkpoint folder:  python examples/gpt_neox.py ./pythia-70m "Once upon a time"
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron import NeuronAutoModelForCausalLM, register
from jx_neuron.cache import Cache, LayerKV
from jx_neuron.hf_config import HFConfig
from jx_neuron.nn import ACT, Embedding, LayerNorm, Linear, Span, attend
from jx_neuron.rope import Rotation, inverse_frequencies, rope_half, rotation
from jx_neuron.weights import W


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
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25)
    )

    MODEL_TYPE: ClassVar[str] = "gpt_neox"
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "hidden_dropout", "classifier_dropout"})
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attention_bias": (True,), "tie_word_embeddings": (False,)}

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        return dict(d=d, n=n, k=n, h=d // n, f=self.intermediate_size, v=self.vocab_size, c=3)

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def frequencies(self) -> Any:
        rope = self.rope_parameters
        return inverse_frequencies(int(self.sizes["h"] * rope["partial_rotary_factor"]), rope["rope_theta"])


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

    def __call__(self, x_btd: Array, kv: LayerKV, at: Span, by: Rotation) -> tuple[Array, LayerKV]:
        qkv = self.query_key_value(self.input_layernorm(x_btd))
        a_btnh, kv = attend(rotate(qkv[:, :, 0], by), rotate(qkv[:, :, 1], by), qkv[:, :, 2], kv, at)
        y_btd = x_btd + self.dense(a_btnh)
        m_btf = self.act(self.dense_h_to_4h(self.post_attention_layernorm(x_btd if self.parallel else y_btd)))
        return y_btd + self.dense_4h_to_h(m_btf), kv


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_in = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.final_layer_norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.embed_out = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.cfg = cfg

    def __call__(self, tokens_bt: Array, cache: Cache, at: Span) -> tuple[Array, Cache]:
        x_btd, by, written = self.embed_in(tokens_bt), rotation(at, self.cfg.frequencies), []
        for block, kv in zip(self.layers, cache, strict=True):
            x_btd, kv = block(x_btd, kv, at, by)  # noqa: PLW2901
            written.append(kv)
        return self.final_layer_norm(x_btd), tuple(written)

    def logits(self, x_btd: Array) -> Array:
        return self.embed_out.attend(x_btd)


L, O = "gpt_neox.layers.{i}.", "layers.{i}."  # noqa: E741
NORMS = ("input_layernorm", "post_attention_layernorm")
WEIGHTS = (
    W("gpt_neox.embed_in.weight", "embed_in.embedding", "v d -> v d", P("tp", None)),
    *(W(f"{L}{n}.{a}", f"{O}{n}.{b}", "d -> d") for n in NORMS for a, b in (("weight", "scale"), ("bias", "bias"))),
    W(L + "attention.query_key_value.weight", O + "query_key_value.kernel", "(n c h) d -> d c n h",
      P(None, None, "tp", None)),
    W(L + "attention.query_key_value.bias", O + "query_key_value.bias", "(n c h) -> c n h", P(None, "tp", None)),
    W(L + "attention.dense.weight", O + "dense.kernel", "d (n h) -> n h d", P("tp", None, None)),
    W(L + "attention.dense.bias", O + "dense.bias", "d -> d"),
    W(L + "mlp.dense_h_to_4h.weight", O + "dense_h_to_4h.kernel", "f d -> d f", P(None, "tp")),
    W(L + "mlp.dense_h_to_4h.bias", O + "dense_h_to_4h.bias", "f -> f", P("tp")),
    W(L + "mlp.dense_4h_to_h.weight", O + "dense_4h_to_h.kernel", "d f -> f d", P("tp", None)),
    W(L + "mlp.dense_4h_to_h.bias", O + "dense_4h_to_h.bias", "d -> d"),
    W("gpt_neox.final_layer_norm.weight", "final_layer_norm.scale", "d -> d"),
    W("gpt_neox.final_layer_norm.bias", "final_layer_norm.bias", "d -> d"),
    W("embed_out.weight", "embed_out.embedding", "v d -> v d", P("tp", None)),
)  # fmt: skip
IGNORE = (r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",)

register("gpt_neox", SimpleNamespace(Config=Config, Model=Model, WEIGHTS=WEIGHTS, IGNORE=IGNORE))

if __name__ == "__main__":
    folder, prompt = sys.argv[1:]
    model = NeuronAutoModelForCausalLM.from_pretrained(folder)
    ids = model.tokenizer(prompt)["input_ids"]
    print(model.tokenizer.decode(model.sample([ids], len(ids) + 64, top_k=1)[0]))
