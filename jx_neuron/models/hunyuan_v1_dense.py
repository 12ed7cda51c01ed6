"""Hunyuan, dense (Tencent Hunyuan Team, 2025): queries and keys are normalized after RoPE.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/hunyuan_v1_dense/modeling_hunyuan_v1_dense.py
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel
from jx_neuron.models.rows import attention, embedding, gated_mlp, rms_norm
from jx_neuron.nn.layers import RMSNorm
from jx_neuron.nn.rope import RopeScaling, Rotation
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import GatedMLP, NormAfterRopeAttention


@dataclass(frozen=True)
class Config(LlamaLikeConfig):
    """HF's HunYuanDenseV1Config."""

    vocab_size: int = 290943
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False

    MODEL_TYPE = "hunyuan_v1_dense"
    COMPLETE = True
    LAYERS_ALIKE = True
    INERT = frozenset("eod_token_id pretraining_tp".split())
    ROPE_KEYS = frozenset({"alpha"})

    @property
    def rope(self) -> RopeScaling:
        # "dynamic" with an alpha is one theta for all lengths: theta · alpha^(h / (h - 2))
        rope, h = super().rope, self.sizes["h"]
        if rope.kind == "dynamic" and "alpha" in rope.parameters:
            rope.kind, rope.theta = "default", rope.theta * rope.parameters["alpha"] ** (h / (h - 2))
        return rope


class Block(nnx.Module):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        q_norm, k_norm = RMSNorm(h, eps), RMSNorm(h, eps)
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = NormAfterRopeAttention(
            cfg.sizes, bias=cfg.attention_bias, q_norm=q_norm, k_norm=k_norm, rngs=rngs
        )
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Rotation) -> tuple[Array, LayerState]:
        a_btd, state = self.self_attn(self.input_layernorm(x_btd), state, at, by)
        x_btd = x_btd + a_btd
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), state


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        super().__init__(cfg, (Block(cfg, rngs) for _ in range(cfg.layers)), rngs)


LAYER = "model.layers.{i}."
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(LAYER + "input_layernorm"),
    *attention(LAYER + "self_attn"),
    rms_norm(LAYER + "self_attn.query_layernorm", "layers.{i}.self_attn.q_norm", width="h"),
    rms_norm(LAYER + "self_attn.key_layernorm", "layers.{i}.self_attn.k_norm", width="h"),
    rms_norm(LAYER + "post_attention_layernorm"),
    *gated_mlp(LAYER + "mlp", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = EXTRA_TENSORS
