"""Parts of families with Gated DeltaNet next to gated attention (Qwen3-Next and Qwen3.5).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_next/modeling_qwen3_next.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import divisible
from jx_neuron.checkpoint.weights import W
from jx_neuron.models.llama_like import LlamaLikeConfig, full_every
from jx_neuron.models.recurrent import ATTENTION, FULL, LINEAR, HybridBlock, HybridConfig, convolution, fused
from jx_neuron.models.rows import gated_attention, rms_norm, row_parallel
from jx_neuron.nn.gated_delta_net import GatedDeltaNet
from jx_neuron.nn.layers import ACT, RMSNorm
from jx_neuron.nn.layout import S
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.sublayers import GatedAttention

__all__ = ["DELTA_NET_STATE", "DeltaNetBlock", "DeltaNetConfig", "delta_net_layer"]


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(HybridConfig, LlamaLikeConfig):
    """Where `layer_types` is null, every `full_attention_interval`-th layer is of type FULL."""

    head_dim: int | None = 256
    partial_rotary_factor: float = 0.25
    attention_bias: bool = False
    full_attention_interval: int = 4
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    # what is drafted besides the next token, and the dtype that kernels keep the state in, which is float32 here
    INERT: ClassVar[frozenset[str]] = frozenset(
        "mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings".split()
    )
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attn_output_gate": (True,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        p, g = self.linear_num_value_heads, self.linear_num_key_heads
        divisible(self.MODEL_TYPE, "linear_num_value_heads", p, "linear_num_key_heads", g)

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


class DeltaNetBlock(HybridBlock):
    """GatedAttention or GatedDeltaNet, and `mlp`; norms before them are of 1 + weight."""

    def __init__(self, cfg: DeltaNetConfig, layer: int, mlp: nnx.Module, rngs: nnx.Rngs):
        d, h, eps = cfg.hidden_size, cfg.sizes["h"], cfg.rms_norm_eps
        if cfg.types[layer] == FULL:
            norms: dict[str, Any] = dict(q_norm=RMSNorm(h, eps, offset=1), k_norm=RMSNorm(h, eps, offset=1))
            mixer: nnx.Module = GatedAttention(cfg.sizes, bias=cfg.attention_bias, **norms, rngs=rngs)
        else:
            mixer = GatedDeltaNet(cfg.sizes, act=ACT[cfg.hidden_act], eps=eps, rngs=rngs)
        super().__init__(RMSNorm(d, eps, offset=1), mixer, RMSNorm(d, eps, offset=1), mlp)


def delta_net_layer(*, grouped: bool = False) -> tuple[W, ...]:
    """The rows of a DeltaNetBlock except for its `mlp`; `grouped` as `_gated_delta_net` has it."""
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    return (
        rms_norm(theirs + "input_layernorm", ours + "norm"),
        *gated_attention(theirs + "self_attn", ours + "mixer"),
        *(rms_norm(f"{theirs}self_attn.{x}_norm", f"{ours}mixer.{x}_norm", width="h") for x in "qk"),
        *_gated_delta_net(theirs + "linear_attn", ours + "mixer", grouped),
        rms_norm(theirs + "post_attention_layernorm", ours + "mlp_norm"),
    )


def _gated_delta_net(source: str, target: str, grouped: bool) -> tuple[W, ...]:
    """grouped: projections have what is of a group together, as Qwen3-Next's, and not all heads' of one kind, as
    Qwen3.5's."""
    letters = dict(q="g j", k="g j", v="p i", z="p i", b="p", a="p")
    if grouped:
        axes, projections = "(g ({}))", {"qkvz": fused("j", "j", "p/g i", "p/g i"), "ba": fused("p/g", "p/g")}
    else:
        axes, projections = "({})", {"qkv": fused("g j", "g j", "p i"), "z": ["p i"], "b": ["p"], "a": ["p"]}
    conv = zip(("conv_q", "conv_k", "conv_v"), fused("g j", "g j", "p i"), strict=True)
    return (
        *(
            W(
                f"{source}.in_proj_{kinds}.weight",
                f"{target}.in_proj.{kind}.kernel",
                f"{axes.format(part)} d -> d {letters[kind]}",
                P(None, AXIS),
            )
            for kinds, parts in projections.items()
            for kind, part in zip(kinds, parts, strict=True)
        ),
        *convolution(f"{source}.conv1d", {f"{target}.{name}": part for name, part in conv}),
        *(W(f"{source}.{name}", f"{target}.{name}", "p -> p", P(AXIS)) for name in ("A_log", "dt_bias")),
        W(f"{source}.norm.weight", f"{target}.norm.scale", "i -> i"),
        *row_parallel(f"{source}.out_proj", f"{target}.out_proj", "p i", bias=False),
    )


DELTA_NET_STATE = (
    *ATTENTION,
    *(S(name, "r g j", P(None, AXIS), LINEAR) for name in ("q", "k")),
    S("v", "r p i", P(None, AXIS), LINEAR),
    S("s", "p i j", P(AXIS), LINEAR, "float32"),
)
"""Keys and values of attention; inputs of the convolutions, and the recurrence's state."""
