"""Parts of families with recurrent layers: the types of their layers, a block, and rows of weights and of STATE.

Letters are those of jx_neuron.nn.recurrent: p heads in g groups, i and j the sizes of a head's state, w taps of a
convolution, and r = w - 1 inputs that it keeps; o groups, where an axis of them is whole; and c channels of a
convolution alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import FULL, divisible
from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import LlamaLikeConfig, RopeConfig
from jx_neuron.models.rows import column_parallel, ours, row_parallel
from jx_neuron.nn.layers import ACT
from jx_neuron.nn.layout import KV, S
from jx_neuron.nn.mamba2 import GroupsRMSNorm, Mamba2
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.state import LayerState, Positions
from jx_neuron.nn.sublayers import Attention
from jx_neuron.util.arguments import shown

__all__ = [
    "ATTENTION",
    "FULL",
    "LINEAR",
    "HybridBlock",
    "HybridConfig",
    "MambaConfig",
    "convolution",
    "fused",
    "mamba2",
    "mamba2_layer",
    "mamba2_state",
    "require_any_time_step",
]

LINEAR = "linear_attention"
# https://github.com/huggingface/transformers/blob/main/src/transformers/configuration_utils.py
LEGACY: Mapping[str, str] = {"mamba": LINEAR, "attention": FULL}
ATTENTION = tuple(replace(row, of=FULL) for row in KV)
"""Keys and values, of layers with attention."""


@dataclass(frozen=True, kw_only=True)
class HybridConfig(RopeConfig):
    """Layers are of type FULL, or of the type RECURRENT; where `layer_types` is null, those of `usual_types`."""

    layer_types: list[str] | None = None

    RECURRENT: ClassVar[str] = LINEAR

    @property
    def usual_types(self) -> list[str]:
        """HF's value for null."""
        return [self.RECURRENT] * self.layers

    @property
    def types(self) -> list[str]:
        """Raises ConfigError for other types, and for more or fewer than there are layers."""
        types = self.usual_types if self.layer_types is None else [LEGACY.get(str(t), t) for t in self.layer_types]
        if wrong := next((kind for kind in types if kind not in (FULL, self.RECURRENT)), None):
            raise ConfigError(
                f"{self.MODEL_TYPE}: layer_types may hold {FULL} and {self.RECURRENT}, and not {shown(wrong)}"
            )
        if len(types) != self.layers:
            raise ConfigError(f"{self.MODEL_TYPE}: layer_types has {len(types)} entries for {self.layers} layers")
        return types


@dataclass(frozen=True, kw_only=True)
class MambaConfig(LlamaLikeConfig):
    """The fields of decoders that have Mamba-2 next to attention."""

    mamba_n_heads: int = 128
    mamba_d_head: int | str = "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = field(default=4, metadata={"least": 2})
    mamba_expand: int = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: list[Any] | tuple[Any, ...] | None = (0.0, inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_any_time_step(self.MODEL_TYPE, self.time_step_limit)

    @property
    def mamba_width(self) -> int:
        """That of all heads."""
        return self.mamba_expand * self.hidden_size

    @property
    def sizes(self) -> dict[str, int]:
        """Raises ConfigError where heads or groups do not divide."""
        family, p, g, w = self.MODEL_TYPE, self.mamba_n_heads, self.mamba_n_groups, self.mamba_d_conv
        divisible(family, "Mamba's width", self.mamba_width, "mamba_n_heads", p)
        divisible(family, "mamba_n_heads", p, "mamba_n_groups", g)
        if self.mamba_d_head not in ("auto", i := self.mamba_width // p):
            raise ConfigError(
                f"{family}: mamba_d_head={shown(self.mamba_d_head)} is not supported; it may be auto, or "
                f"{i}, which mamba_n_heads={p} come to"
            )
        return super().sizes | dict(p=p, g=g, o=g, i=i, j=self.mamba_d_state, w=w, r=w - 1)


class HybridBlock(nnx.Module):
    """x + mixer(norm(x)), and then x + mlp(norm(x)); the mixer is attention in some layers, a recurrence in the others.

    scale: of what is added.
    """

    def __init__(self, norm: nnx.Module, mixer: nnx.Module, mlp_norm: nnx.Module, mlp: nnx.Module, scale: float = 1.0):
        self.norm: Any = norm
        self.mixer: Any = mixer
        self.mlp_norm: Any = mlp_norm
        self.mlp: Any = mlp
        self.scale = scale

    def __call__(self, x_btd: Array, state: LayerState, at: Positions, by: Any) -> tuple[Array, LayerState]:
        rotation = (by,) if isinstance(self.mixer, Attention) else ()
        y_btd, state = self.mixer(self.norm(x_btd), state, at, *rotation)
        x_btd = x_btd + y_btd * self.scale
        return x_btd + self.mlp(self.mlp_norm(x_btd)) * self.scale, state


def mamba2_layer(cfg: MambaConfig, *, has_norm: bool = True, rngs: nnx.Rngs, **options: Any) -> Mamba2:
    """The layer of a config's fields; `options` are those of Mamba2 that it has none for."""
    return Mamba2(
        cfg.sizes,
        bias=cfg.mamba_proj_bias,
        conv_bias=cfg.mamba_conv_bias,
        act=ACT[cfg.hidden_act],
        norm=GroupsRMSNorm(cfg.sizes, cfg.rms_norm_eps) if has_norm else None,
        rngs=rngs,
        **options,
    )


def fused(*parts: str) -> list[str]:
    """Of each part of a fused axis how a layout takes it.

    >>> fused("p i", "g j")
    ['[p i] + g j', 'p i + [g j]']
    """
    return [" + ".join(f"[{part}]" if n == i else part for n, part in enumerate(parts)) for i in range(len(parts))]


def convolution(source: str, targets: Mapping[str, str]) -> Iterator[W]:
    """A torch Conv1d over channels one by one: of each `CausalConv` its part of them, as "[p i] + g j" takes one."""
    for target, part in targets.items():
        letters = part.partition("[")[2].partition("]")[0] or part
        rest = [None] * (len(letters.split()) - 1)
        yield W(f"{source}.weight", f"{target}.kernel", f"({part}) 1 w -> w {letters}", P(None, AXIS, *rest))
        yield W(f"{source}.bias", f"{target}.bias", f"({part}) -> {letters}", P(AXIS, *rest))


def mamba2(source: str, target: str | None = None) -> tuple[W, ...]:
    """The parameters of a jx_neuron.nn.mamba2.Mamba2."""
    target = target or ours(source)
    projections = zip(("z", "x", "B", "C", "dt"), fused("p i", "p i", "g j", "g j", "p"), strict=True)
    convolutions = zip(("conv_x", "conv_B", "conv_C"), fused("p i", "g j", "g j"), strict=True)
    return (
        *(
            row
            for name, part in projections
            for row in column_parallel(f"{source}.in_proj", f"{target}.in_proj.{name}", part)
        ),
        *convolution(f"{source}.conv1d", {f"{target}.{name}": part for name, part in convolutions}),
        *(W(f"{source}.{name}", f"{target}.{name}", "p -> p", P(AXIS)) for name in ("A_log", "D", "dt_bias")),
        W(f"{source}.norm.weight", f"{target}.norm.scale", "(p i) -> p i", P(AXIS, None)),
        W(_groups, f"{target}.norm.of_group", "g o -> g o", P(AXIS, None)),
        *row_parallel(f"{source}.out_proj", f"{target}.out_proj", "p i"),
    )


def _groups(config: Any) -> np.ndarray:
    return np.eye(config.sizes["g"], dtype=np.float32)


def mamba2_state(of: str | None = None) -> tuple[S, ...]:
    """The state of a jx_neuron.nn.mamba2.Mamba2."""
    return (
        S("x", "r p i", P(None, AXIS), of),
        S("B", "r g j", P(None, AXIS), of),
        S("C", "r g j", P(None, AXIS), of),
        S("ssm", "p i j", P(AXIS), of, "float32"),
    )


INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it


def require_any_time_step(family: str, limit: Sequence[Any] | None) -> None:
    """Raises ConfigError where time steps are limited: HF limits those of a prompt, and not those of an answer."""
    if limit is not None and list(limit) not in ([0, inf], [0, INFINITY]):
        raise ConfigError(f"{family}: time_step_limit={shown(limit)} is not supported, only [0.0, Infinity]")
