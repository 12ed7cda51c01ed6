"""Parts of families with short gated convolutions next to attention (LFM2, arXiv:2511.23404).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/lfm2/modeling_lfm2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import LlamaLikeConfig
from jx_neuron.models.recurrent import ATTENTION, FULL, HybridBlock, HybridConfig, convolution, fused
from jx_neuron.models.rows import attention, column_parallel, rms_norm, row_parallel
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.layout import S
from jx_neuron.nn.recurrent import ShortConv
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.sublayers import Attention

__all__ = ["CONV", "LFM2_LAYER", "SHORT_CONV_STATE", "ShortConvBlock", "ShortConvConfig"]

CONV = "conv"


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(HybridConfig, LlamaLikeConfig):
    """Layers are of type FULL or CONV."""

    rms_norm_eps: float = field(default=1e-5, metadata={"hf": "norm_eps"})
    rope_theta: float = 1000000.0
    tie_word_embeddings: bool = True
    conv_bias: bool = False
    conv_L_cache: int = field(default=3, metadata={"least": 2})  # noqa: N815

    RECURRENT = CONV
    ACT: ClassVar[Mapping[str, Any]] = {"silu": ACT["silu"]}
    ALIASES: ClassVar[Mapping[str, str]] = {"tie_embedding": "tie_word_embeddings"}

    @property
    def sizes(self) -> dict[str, int]:
        w = self.conv_L_cache
        return super().sizes | dict(c=self.hidden_size, w=w, r=w - 1)


class ShortConvBlock(HybridBlock):
    """Attention or a ShortConv, and `mlp`."""

    def __init__(self, cfg: ShortConvConfig, layer: int, mlp: nnx.Module, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        if cfg.types[layer] == FULL:
            norms: dict[str, Any] = dict(q_norm=RMSNorm(h, eps), k_norm=RMSNorm(h, eps))
            mixer: nnx.Module = Attention(cfg.sizes, bias=False, **norms, rngs=rngs)
        else:
            mixer = ShortConv(cfg.sizes, bias=cfg.conv_bias, rngs=rngs)
        super().__init__(RMSNorm(d, eps), mixer, RMSNorm(d, eps), mlp)


def _short_conv(source: str, target: str) -> tuple[W, ...]:
    parts = zip("BCx", fused("c", "c", "c"), strict=True)
    return (
        *(row for c, part in parts for row in column_parallel(f"{source}.in_proj", f"{target}.in_proj.{c}", part)),
        *convolution(f"{source}.conv", {f"{target}.conv": "c"}),
        *row_parallel(f"{source}.out_proj", f"{target}.out_proj", "c"),
    )


L, O = "model.layers.{i}.", "layers.{i}."  # noqa: E741
SHORT_CONV_STATE = (*ATTENTION, S("x", "r c", P(None, AXIS), CONV))
LFM2_LAYER = (
    rms_norm(L + "operator_norm", O + "norm"),
    *attention(L + "self_attn", O + "mixer", out="out_proj", bias=False),
    *(rms_norm(f"{L}self_attn.{x}_layernorm", f"{O}mixer.{x}_norm", width="h") for x in "qk"),
    *_short_conv(L + "conv", O + "mixer"),
    rms_norm(L + "ffn_norm", O + "mlp_norm"),
    *column_parallel(L + "feed_forward.w1", O + "mlp.gate_up.gate_proj", "f", bias=False),
    *column_parallel(L + "feed_forward.w3", O + "mlp.gate_up.up_proj", "f", bias=False),
    *row_parallel(L + "feed_forward.w2", O + "mlp.down_proj", "f", bias=False),
)
"""The rows of a ShortConvBlock whose `mlp` is a GatedMLP."""
