"""Nemotron-4 and Minitron (Parmar et al., arXiv:2402.16819; Muralidharan et al., arXiv:2407.14679).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/nemotron/modeling_nemotron.py
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, GroupedQueryConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, column_parallel, embedding, layer_norm, row_parallel
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, LayerNorm, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(GroupedQueryConfig):
    """HF's NemotronConfig."""

    vocab_size: int = 256000
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 32
    num_attention_heads: int = 48
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    mlp_bias: bool = False

    MODEL_TYPE: ClassVar[str] = "nemotron"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = LayerNorm(d, cfg.norm_eps, offset=1)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = LayerNorm(d, cfg.norm_eps, offset=1)
        self.up_proj = Linear((d,), (f,), bias=cfg.mlp_bias, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=cfg.mlp_bias, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at)
        x_btd = x_btd + self.o_proj(a_btnh)
        return x_btd + self.down_proj(self.act(self.up_proj(self.post_attention_layernorm(x_btd)))), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs, norm=norm)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS),
    *layer_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *column_parallel(HF + "mlp.up_proj", OURS + "up_proj", "f"),
    *row_parallel(HF + "mlp.down_proj", OURS + "down_proj", "f"),
    *layer_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
