"""SmolLM3 (Hugging Face, 2025): Llama of which every fourth layer has no positions (Yang et al., arXiv:2501.18795).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/smollm3/modeling_smollm3.py
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import (
    EXTRA_TENSORS,
    FULL,
    SLIDING,
    LlamaLikeConfig,
    LlamaLikeModel,
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
    """HF's SmolLM3Config."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2000000.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    layer_types: list[str] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True

    MODEL_TYPE: ClassVar[str] = "smollm3"
    COMPLETE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset("attention_dropout max_window_layers pretraining_tp".split())

    def __post_init__(self) -> None:
        entries = self.no_rope_layers
        if entries is not None and (len(entries) < self.layers or not all(entry in (0, 1) for entry in entries)):
            raise ConfigError(
                f"smollm3: no_rope_layers={shown(entries)} should have an entry for each of {self.layers} layers, "
                "1 for RoPE and 0 for none"
            )
        super().__post_init__()

    @property
    def rotates(self) -> list[bool]:
        """Whether each layer has RoPE."""
        if self.no_rope_layers is not None:
            return [bool(entry) for entry in self.no_rope_layers[: self.layers]]
        return [(layer + 1) % self.no_rope_layer_interval != 0 for layer in range(self.layers)]

    @property
    def types(self) -> list[str]:
        windowed = self.use_sliding_window and self.sliding_window is not None
        usual = [SLIDING if windowed and not rotates else FULL for rotates in self.rotates]
        return layer_types(self, self.layer_types, usual)

    @property
    def windows(self) -> list[int | None]:
        return layer_windows(self, self.types, self.sliding_window)


class Block(nnx.Module):
    def __init__(self, cfg: Config, window: int | None, rotates: bool, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=cfg.attention_bias, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=cfg.mlp_bias, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=cfg.mlp_bias, rngs=rngs)
        self.act = ACT[cfg.hidden_act]
        self.window, self.rotates = window, rotates

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        if self.rotates:
            q_btnh, k_btkh = rope_half(q_btnh, by), rope_half(k_btkh, by)
        a_btnh, state = attend(q_btnh, k_btkh, v_btkh, state, at, window=self.window)
        x_btd = x_btd + self.o_proj(a_btnh)
        gate_btf, up_btf = self.gate_up(self.post_attention_layernorm(x_btd))
        return x_btd + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        kinds = zip(cfg.windows, cfg.rotates, strict=True)
        super().__init__(cfg, (Block(cfg, window, rotates, rngs) for window, rotates in kinds), rngs)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
