"""Command R7B and Command A (Cohere, arXiv:2504.00698): windows and RoPE in three of four layers, no RoPE in the rest.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/cohere2/modeling_cohere2.py
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    GroupedQueryConfig,
    LlamaLikeModel,
    full_every,
    layer_types,
    layer_windows,
)
from jx_neuron.models.rows import attention, embedding, gated_mlp, layer_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, LayerNorm, Linear, Linears
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(GroupedQueryConfig):
    """HF's Cohere2Config."""

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    logit_scale: float = 0.0625
    sliding_window: int | None = 4096
    sliding_window_pattern: int | None = None
    layer_types: list[str] | None = None

    MODEL_TYPE: ClassVar[str] = "cohere2"
    COMPLETE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "_sliding_window_pattern"})
    USUAL: ClassVar[dict[str, Any]] = GroupedQueryConfig.USUAL | {
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    }

    @property
    def types(self) -> list[str]:
        return layer_types(self, self.layer_types, full_every(self.sliding_window_pattern or 4, self.layers))

    @property
    def windows(self) -> list[int | None]:
        return layer_windows(self, self.types, self.sliding_window)


class Block(nnx.Module):
    def __init__(self, cfg: Config, window: int | None, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = LayerNorm(d, cfg.layer_norm_eps, bias=False)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act, self.window = ACT[cfg.hidden_act], window

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        h_btd = self.input_layernorm(x_btd)
        q_btnh, k_btkh, v_btkh = self.qkv(h_btd)
        if self.window is not None:
            q_btnh, k_btkh = rope_interleaved(q_btnh, by), rope_interleaved(k_btkh, by)
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, window=self.window)
        gate_btf, up_btf = self.gate_up(h_btd)
        return x_btd + self.o_proj(a_btnh) + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        super().__init__(cfg, (Block(cfg, window, rngs) for window in cfg.windows), rngs, norm=norm)
        self.logit_scale = cfg.logit_scale

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) * self.logit_scale


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *layer_norm(HF + "input_layernorm", OURS + "input_layernorm", bias=False),
    *attention(HF + "self_attn.", OURS),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    *layer_norm("model.norm", "norm", bias=False),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
