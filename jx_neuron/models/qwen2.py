"""Qwen2 and Qwen2.5 (Qwen Team, arXiv:2407.10671, arXiv:2412.15115).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2/modeling_qwen2.py
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    LlamaLikeConfig,
    LlamaLikeModel,
    layer_types,
    layer_windows,
    sliding_from,
)
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Qwen2Config."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = field(default=28, metadata={"least": 0})
    layer_types: list[str] | None = None

    MODEL_TYPE: ClassVar[str] = "qwen2"
    COMPLETE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    USUAL: ClassVar[dict[str, Any]] = LlamaLikeConfig.USUAL | {"use_mrope": False}

    @property
    def window(self) -> int | None:
        """Of layers that have one."""
        return self.sliding_window if self.use_sliding_window else None

    @property
    def types(self) -> list[str]:
        first = self.layers if self.window is None else self.max_window_layers
        return layer_types(self, self.layer_types, sliding_from(first, self.layers))

    @property
    def windows(self) -> list[int | None]:
        return layer_windows(self, self.types, self.window)


class Block(nnx.Module):
    def __init__(self, cfg: Config, window: int | None, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=True, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT[cfg.hidden_act]
        self.window = window

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        a_btnh, state = attend(rope_half(q_btnh, by), rope_half(k_btkh, by), v_btkh, state, at, window=self.window)
        x_btd = x_btd + self.o_proj(a_btnh)
        gate_btf, up_btf = self.gate_up(self.post_attention_layernorm(x_btd))
        return x_btd + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, window, rngs) for window in cfg.windows), rngs)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS, out_bias=False),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
