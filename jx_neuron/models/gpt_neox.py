"""GPT-NeoX (Black et al., arXiv:2204.06745), and Pythia (Biderman et al., arXiv:2304.01373).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_neox/modeling_gpt_neox.py
"""

from dataclasses import dataclass, field
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import column_parallel, embedding, grouped_qkv, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(RopeConfig):
    """HF's GPTNeoXConfig."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    partial_rotary_factor: float = field(default=0.25, metadata={"hf": "rotary_pct"})
    rope_theta: float = field(default=10000.0, metadata={"hf": "rotary_emb_base"})

    MODEL_TYPE: ClassVar[str] = "gpt_neox"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset("attention_dropout classifier_dropout hidden_dropout".split())

    def __post_init__(self) -> None:
        one_of("gpt_neox", "hidden_act", self.hidden_act, ACT)
        divisible("gpt_neox", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        return dict(d=d, n=n, k=n, h=d // n, f=self.intermediate_size, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, h, f = (cfg.sizes[c] for c in "dnhf")
        qkv = dict(q_proj=(n, h), k_proj=(n, h), v_proj=(n, h))
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.dense = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.dense_h_to_4h = Linear((d,), (f,), bias=True, rngs=rngs)
        self.dense_4h_to_h = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.hidden_act]
        self.parallel = cfg.use_parallel_residual

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btnh, v_btnh = self.qkv(self.input_layernorm(x_btd))
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btnh, by), v_btnh, state, at)
        y_btd = x_btd + self.dense(a_btnh)
        m_btf = self.act(self.dense_h_to_4h(self.post_attention_layernorm(x_btd if self.parallel else y_btd)))
        return y_btd + self.dense_4h_to_h(m_btf), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_in = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, rngs) for _ in range(cfg.layers))
        self.final_layer_norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.embed_out = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed_in(tokens_bt), state, at, self.rope(at))
        return self.final_layer_norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_in if self.embed_out is None else self.embed_out).attend(x_btd)


HF, OURS = "gpt_neox.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("gpt_neox.embed_in", "embed_in"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *grouped_qkv(HF + "attention.query_key_value", OURS + "qkv"),
    *row_parallel(HF + "attention.dense", OURS + "dense", "n h"),
    *layer_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *column_parallel(HF + "mlp.dense_h_to_4h", OURS + "dense_h_to_4h", "f"),
    *row_parallel(HF + "mlp.dense_4h_to_h", OURS + "dense_4h_to_h", "f"),
    *layer_norm("gpt_neox.final_layer_norm", "final_layer_norm"),
    embedding("embed_out", "embed_out"),
)

# causal masks and inverse frequencies that older checkpoints carry, and the head where it is tied
IGNORE = (
    r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    Copy("embed_out.weight", of="gpt_neox.embed_in.weight"),
)
