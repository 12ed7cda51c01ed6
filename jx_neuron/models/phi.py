"""Phi (Gunasekar et al., arXiv:2306.11644; Li et al., arXiv:2309.05463).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/phi/modeling_phi.py
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import divisible, one_of
from jx_neuron.checkpoint.weights import Copy, W
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import attention, column_parallel, embedding, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Layers, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(RopeConfig):
    """HF's PhiConfig."""

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = False
    partial_rotary_factor: float = 0.5
    tie_word_embeddings: bool = False

    MODEL_TYPE: ClassVar[str] = "phi"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset("attention_dropout embd_pdrop resid_pdrop".split())

    def __post_init__(self) -> None:
        one_of("phi", "hidden_act", self.hidden_act, ACT)
        n, k = self.sizes["n"], self.sizes["k"]
        divisible("phi", "hidden_size", self.hidden_size, "num_attention_heads", n)
        divisible("phi", "num_attention_heads", n, "num_key_value_heads", k)
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k = n if self.num_key_value_heads is None else self.num_key_value_heads
        return dict(d=d, n=n, k=k, h=d // n, f=self.intermediate_size, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_eps)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h)), bias=True, rngs=rngs)
        self.q_layernorm = LayerNorm(h, cfg.layer_norm_eps) if cfg.qk_layernorm else None
        self.k_layernorm = LayerNorm(h, cfg.layer_norm_eps) if cfg.qk_layernorm else None
        self.dense = Linear((n, h), (d,), bias=True, rngs=rngs)
        self.fc1 = Linear((d,), (f,), bias=True, rngs=rngs)
        self.fc2 = Linear((f,), (d,), bias=True, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        q_btnh, k_btkh, v_btkh = self.qkv(h_btd)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_btnh, k_btkh = self.q_layernorm(q_btnh), self.k_layernorm(k_btkh)
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at)
        return x_btd + self.dense(a_btnh) + self.fc2(self.act(self.fc1(h_btd))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(Block(cfg, rngs) for _ in range(cfg.layers))
        self.final_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.lm_head_bias = nnx.Param(jnp.zeros((cfg.vocab_size,)))
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed_tokens(tokens_bt), state, at, self.rope(at))
        return self.final_layernorm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.attend(x_btd) + self.lm_head_bias[...]


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS, out="dense"),
    *(
        W(f"{HF}self_attn.{norm}.{theirs}", f"{OURS}{norm}.{ours}", "h -> h")
        for norm in ("q_layernorm", "k_layernorm")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    *column_parallel(HF + "mlp.fc1", OURS + "fc1", "f"),
    *row_parallel(HF + "mlp.fc2", OURS + "fc2", "f"),
    *layer_norm("model.final_layernorm", "final_layernorm"),
    embedding("lm_head", "lm_head"),
    W("lm_head.bias", "lm_head_bias", "v -> v", P("tp")),
)

# inverse frequencies that older checkpoints carry, and the head where it is tied
IGNORE = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", Copy("lm_head.weight", of="model.embed_tokens.weight"))
