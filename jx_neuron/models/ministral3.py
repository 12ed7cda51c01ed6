"""Ministral 3 (Mistral AI, arXiv:2601.08584).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/ministral3/modeling_ministral3.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, query_scale, rope_half
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Ministral3Config."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None

    MODEL_TYPE: ClassVar[str] = "ministral3"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    ROPE_KEYS: ClassVar[frozenset[str]] = frozenset({"llama_4_scaling_beta", "max_position_embeddings"})
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if "llama_4_scaling_beta" not in self.rope.parameters:
            raise ConfigError("ministral3: rope_parameters needs llama_4_scaling_beta, a number")

    @property
    def windows(self) -> list[int | None]:
        return [self.sliding_window] * self.layers


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=False, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, cfg.rms_norm_eps)
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT[cfg.hidden_act]
        self.window = cfg.sliding_window

    def __call__(
        self, x_btd: Array, state: LayerState, at: Positions, by: Rotation, scale_bt11: Array
    ) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        q_btnh = rope_half(q_btnh, by) * scale_bt11.astype(q_btnh.dtype)
        a_btnh, state = attend(q_btnh, rope_half(k_btkh, by), v_btkh, state, at, window=self.window)
        x_btd = x_btd + self.o_proj(a_btnh)
        gate_btf, up_btf = self.gate_up(self.post_attention_layernorm(x_btd))
        return x_btd + self.down_proj(self.act(gate_btf) * up_btf), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)
        self.beta = cfg.rope.parameters["llama_4_scaling_beta"]

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return self.rope(at), query_scale(at, self.beta, self.rope.original)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS, bias=False),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, bias=False),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
