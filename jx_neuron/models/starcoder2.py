"""StarCoder2 (Lozhkov et al., arXiv:2402.19173).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/starcoder2/modeling_starcoder2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import attention, column_parallel, embedding, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Embedding, LayerNorm, Linear, Linears, through
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions, State


@dataclass(frozen=True)
class Config(RopeConfig):
    """HF's Starcoder2Config."""

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int = 2
    head_dim: int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    norm_epsilon: float = 1e-5
    sliding_window: int | None = None
    use_bias: bool = True
    tie_word_embeddings: bool = True

    MODEL_TYPE: ClassVar[str] = "starcoder2"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset("attention_dropout embedding_dropout residual_dropout".split())
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[Mapping[str, Any]] = {"mlp_type": "default", "norm_type": "layer_norm"}

    def __post_init__(self) -> None:
        one_of("starcoder2", "hidden_act", self.hidden_act, ACT)
        if self.head_dim is None:
            divisible("starcoder2", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        n, k = self.num_attention_heads, self.num_key_value_heads
        divisible("starcoder2", "num_attention_heads", n, "num_key_value_heads", k)
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n, k = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        return dict(d=d, n=n, k=k, h=self.head_dim or d // n, f=self.intermediate_size, v=self.vocab_size)


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        bias = cfg.use_bias
        self.input_layernorm = LayerNorm(d, cfg.norm_epsilon)
        self.qkv = Linears((d,), dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h)), bias=bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=bias, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, cfg.norm_epsilon)
        self.c_fc = Linear((d,), (f,), bias=bias, rngs=rngs)
        self.c_proj = Linear((f,), (d,), bias=bias, rngs=rngs)
        self.act = ACT[cfg.hidden_act]
        self.window = cfg.sliding_window

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        q_btnh, k_btkh = rope_half(q_btnh, by), rope_half(k_btkh, by)
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, window=self.window)
        x_btd = x_btd + self.o_proj(a_btnh)
        return x_btd + self.c_proj(self.act(self.c_fc(self.post_attention_layernorm(x_btd)))), state


class Model(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = nnx.List(Block(cfg, rngs) for _ in range(cfg.layers))
        self.norm = LayerNorm(cfg.hidden_size, cfg.norm_epsilon)
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.rope = cfg.rope

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = through(self.layers, self.embed_tokens(tokens_bt), state, at, self.rope(at))
        return self.norm(x_btd), state

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS),
    *layer_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *column_parallel(HF + "mlp.c_fc", OURS + "c_fc", "f"),
    *row_parallel(HF + "mlp.c_proj", OURS + "c_proj", "f"),
    *layer_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

# the head where it is tied
IGNORE = (Copy("lm_head.weight", of="model.embed_tokens.weight"),)
