"""EXAONE 4.0 (LG AI Research, arXiv:2507.11407): norms of what sublayers give; with windows, RoPE where they are alone.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/exaone4/modeling_exaone4.py
"""

from dataclasses import dataclass, field
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    FULL,
    LlamaLikeConfig,
    LlamaLikeModel,
    full_every,
    layer_types,
    layer_windows,
)
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_half
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.util.arguments import shown


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Exaone4Config."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 4096
    sliding_window_pattern: int | str | None = field(default=4, metadata={"least": 0})
    layer_types: list[str] | None = None

    MODEL_TYPE: ClassVar[str] = "exaone4"
    COMPLETE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})

    @property
    def types(self) -> list[str]:
        pattern = self.sliding_window_pattern
        if self.layer_types is not None or self.sliding_window is None:
            return layer_types(self, self.layer_types, [FULL] * self.layers)
        if not isinstance(pattern, int) or pattern == 0:  # HF divides by it
            raise ConfigError(
                f"exaone4: sliding_window_pattern={shown(pattern)} is not supported without layer_types; legal is a "
                "number of layers, of which the last sees all positions"
            )
        return full_every(pattern, self.layers)

    @property
    def windows(self) -> list[int | None]:
        return layer_windows(self, self.types, self.sliding_window)


class Block(nnx.Module):
    def __init__(self, cfg: Config, window: int | None, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=False, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(h, cfg.rms_norm_eps) for _ in "qk")
        self.o_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.act, self.window = ACT[cfg.hidden_act], window
        self.rotates = cfg.sliding_window is None or window is not None

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(x_btd)
        q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh)
        if self.rotates:
            q_btnh, k_btkh = rope_half(q_btnh, by), rope_half(k_btkh, by)
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, window=self.window)
        x_btd = x_btd + self.post_attention_layernorm(self.o_proj(a_btnh))
        gate_btf, up_btf = self.gate_up(x_btd)
        return x_btd + self.post_feedforward_layernorm(self.down_proj(self.act(gate_btf) * up_btf)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, window, rngs) for window in cfg.windows), rngs)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    *attention(HF + "self_attn.", OURS, bias=False),
    rms_norm(HF + "self_attn.q_norm", OURS + "q_norm", "h"),
    rms_norm(HF + "self_attn.k_norm", OURS + "k_norm", "h"),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    rms_norm(HF + "post_feedforward_layernorm", OURS + "post_feedforward_layernorm"),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
