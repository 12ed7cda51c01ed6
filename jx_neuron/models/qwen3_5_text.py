"""Qwen3.5, its dense text model (Qwen Team, 2026): Gated DeltaNet in most layers, gated attention in the others.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_5/modeling_qwen3_5.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx

from jx_neuron.checkpoint.hf_config import divisible
from jx_neuron.models.llama_like import EXTRA_TENSORS, LlamaLikeConfig, LlamaLikeModel, full_every
from jx_neuron.models.recurrent import (
    ATTENTION,
    FULL,
    LINEAR,
    HybridBlock,
    HybridConfig,
    gated_delta_net,
    gated_delta_net_state,
)
from jx_neuron.models.rows import embedding, gated_attention, gated_mlp, rms_norm
from jx_neuron.nn.gated_delta_net import GatedDeltaNet
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.sublayers import GatedAttention, GatedMLP


@dataclass(frozen=True)
class Config(HybridConfig, LlamaLikeConfig):
    """HF's Qwen3_5TextConfig."""

    vocab_size: int = 248320
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 32768
    partial_rotary_factor: float = 0.25
    attention_bias: bool = False
    full_attention_interval: int = 4
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    MODEL_TYPE = "qwen3_5_text"
    COMPLETE = True
    # what is drafted beside the next token, and the dtype that kernels keep the state in, which is float32 here
    INERT = frozenset("mamba_ssm_dtype mlp_only_layers mtp_num_hidden_layers mtp_use_dedicated_embeddings".split())
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attn_output_gate": (True,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        p, g = self.linear_num_value_heads, self.linear_num_key_heads
        divisible("qwen3_5_text", "linear_num_value_heads", p, "linear_num_key_heads", g)

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        """Without the parts of a head that turn by rows and columns of images: text has one position in all."""
        return {key: value for key, value in super().rope_fields.items() if not key.startswith("mrope_")}

    @property
    def usual_types(self) -> list[str]:
        return [FULL if kind == FULL else LINEAR for kind in full_every(self.full_attention_interval, self.layers)]

    @property
    def sizes(self) -> dict[str, int]:
        p, g, w = self.linear_num_value_heads, self.linear_num_key_heads, self.linear_conv_kernel_dim
        return super().sizes | dict(p=p, g=g, i=self.linear_value_head_dim, j=self.linear_key_head_dim, w=w, r=w - 1)


class Block(HybridBlock):
    def __init__(self, cfg: Config, layer: int, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        if cfg.types[layer] == FULL:
            norms: dict[str, Any] = dict(q_norm=RMSNorm(h, eps, offset=1), k_norm=RMSNorm(h, eps, offset=1))
            mixer: nnx.Module = GatedAttention(cfg.sizes, bias=cfg.attention_bias, **norms, rngs=rngs)
        else:
            mixer = GatedDeltaNet(cfg.sizes, act=ACT[cfg.hidden_act], eps=eps, rngs=rngs)
        mlp = GatedMLP(cfg.sizes, cfg.hidden_act, bias=False, rngs=rngs)
        super().__init__(RMSNorm(d, eps, offset=1), mixer, RMSNorm(d, eps, offset=1), mlp)


class Model(LlamaLikeModel):
    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1)
        super().__init__(cfg, (Block(cfg, layer, rngs) for layer in range(cfg.layers)), rngs, norm=norm)


L, O = "model.layers.{i}.", "layers.{i}."  # noqa: E741
STATE = (*ATTENTION, *gated_delta_net_state(LINEAR))
WEIGHTS = (
    embedding("model.embed_tokens"),
    rms_norm(L + "input_layernorm", O + "norm"),
    *gated_attention(L + "self_attn", O + "mixer"),
    *(rms_norm(f"{L}self_attn.{x}_norm", f"{O}mixer.{x}_norm", width="h") for x in "qk"),
    *gated_delta_net(L + "linear_attn", O + "mixer"),
    rms_norm(L + "post_attention_layernorm", O + "mlp_norm"),
    *gated_mlp(L + "mlp", bias=False),
    rms_norm("model.norm"),
    embedding("lm_head"),
)

IGNORE = (*EXTRA_TENSORS, r"mtp\..*")
