"""GLM-4-0414 (Z.ai, 2025): GLM-4 with norms before and after each sublayer.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/glm4/modeling_glm4.py
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.attention import attend
from jx_neuron.nn.layers import ACT, Linear, Linears, RMSNorm
from jx_neuron.nn.rope import Rotation, rope_interleaved
from jx_neuron.nn.state import LayerState, Positions


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's Glm4Config."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 0.00000015625
    partial_rotary_factor: float = 0.5
    attention_bias: bool = True

    MODEL_TYPE: ClassVar[str] = "glm4"
    COMPLETE: ClassVar[bool] = True
    LAYERS_ALIKE: ClassVar[bool] = True
    INERT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, n, k, h, f = (cfg.sizes[c] for c in "dnkhf")
        self.input_layernorm, self.post_self_attn_layernorm = (RMSNorm(d, cfg.rms_norm_eps) for _ in range(2))
        qkv = dict(q_proj=(n, h), k_proj=(k, h), v_proj=(k, h))
        self.qkv = Linears((d,), qkv, bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear((n, h), (d,), bias=False, rngs=rngs)
        self.post_attention_layernorm, self.post_mlp_layernorm = (RMSNorm(d, cfg.rms_norm_eps) for _ in range(2))
        self.gate_up = Linears((d,), dict(gate_proj=(f,), up_proj=(f,)), bias=False, rngs=rngs)
        self.down_proj = Linear((f,), (d,), bias=False, rngs=rngs)
        self.act = ACT[cfg.hidden_act]

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        q_btnh, k_btkh, v_btkh = self.qkv(self.input_layernorm(x_btd))
        a_btnh, state = attend(rope_interleaved(q_btnh, by), rope_interleaved(k_btkh, by), v_btkh, state, at)
        x_btd = x_btd + self.post_self_attn_layernorm(self.o_proj(a_btnh))
        gate_btf, up_btf = self.gate_up(self.post_attention_layernorm(x_btd))
        return x_btd + self.post_mlp_layernorm(self.down_proj(self.act(gate_btf) * up_btf)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


HF, OURS = "model.layers.{i}.", "layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens", "embed_tokens"),
    rms_norm(HF + "input_layernorm", OURS + "input_layernorm"),
    *attention(HF + "self_attn.", OURS, out_bias=False),
    rms_norm(HF + "post_self_attn_layernorm", OURS + "post_self_attn_layernorm"),
    rms_norm(HF + "post_attention_layernorm", OURS + "post_attention_layernorm"),
    *gated_mlp(HF + "mlp.", OURS, fused="gate_up_proj", bias=False),
    rms_norm(HF + "post_mlp_layernorm", OURS + "post_mlp_layernorm"),
    rms_norm("model.norm", "norm"),
    embedding("lm_head", "lm_head"),
)

IGNORE = EXTRA_TENSORS
