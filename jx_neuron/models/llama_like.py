"""Parts of Llama and of the decoders after it, and the config of all families with RoPE."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import FULL, HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.models.causal_lm import CausalLM
from jx_neuron.nn.layers import ACT, RMSNorm, head_copies
from jx_neuron.nn.rope import RopeScaling, by_layer_type
from jx_neuron.nn.state import Positions
from jx_neuron.util.arguments import shown

__all__ = [
    "EXTRA_TENSORS",
    "FULL",
    "SLIDING",
    "GroupedQueryConfig",
    "HeadsNormModel",
    "LayerTypesConfig",
    "LlamaLikeConfig",
    "LlamaLikeModel",
    "MaxWindowLayersConfig",
    "MultiHeadConfig",
    "NoRopeLayersConfig",
    "RopeConfig",
    "ScaledModel",
    "SlidingWindowConfig",
    "full_every",
]

SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class RopeConfig(HFConfig):
    """The fields of RoPE, as transformers 5 writes them and as older ones did.

    A family whose heads are rotated in part has a field `partial_rotary_factor`, with HF's default.

    ROPE_KEYS:    keys of rope_parameters that HF has for this family alone, all numbers.
    ROPE_USUAL:   rope_parameters where the config has none.
    ROPE_BY_TYPE: whether rope_parameters may have an entry for each layer type.
    """

    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 10000.0
    original_max_position_embeddings: int | None = None

    ROPE_KEYS: ClassVar[frozenset[str]] = frozenset()
    ROPE_USUAL: ClassVar[Mapping[str, Any]] = {}
    ROPE_BY_TYPE: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rope_scaling and self.rope_parameters and self.rope_scaling != self.rope_parameters:
            raise ConfigError(f"{self.MODEL_TYPE}: rope_scaling and rope_parameters differ; keep the one that is meant")
        _ = self.ropes, self.windows, self.own_state

    @property
    def rope(self) -> RopeScaling:
        """Gives the rotation of a span, in layers of any type. Raises ConfigError for what RoPE cannot have."""
        return self._scaling(self.rope_fields, self.original_max_position_embeddings, self.sizes)

    @property
    def ropes(self) -> dict[str, RopeScaling | None]:
        """Those of each layer type; None where it has no positions."""
        types = list(dict.fromkeys(self.types))
        if not self._has_rope_by_type:
            return dict.fromkeys(types, self.rope)
        entries = by_layer_type(self.rope_fields, types)
        return {
            kind: None
            if entry is None
            else self._scaling(_without_truncate(entry), None, self.sizes_of(self.types.index(kind)))
            for kind, entry in entries.items()
        }

    @property
    def rope_fields(self) -> Mapping[str, Any]:
        """rope_parameters, or rope_scaling as older configs have it."""
        return self.rope_scaling or (self.ROPE_USUAL if self.rope_parameters is None else self.rope_parameters)

    def rope_by_type(self, sliding_theta: float) -> Mapping[str, Any]:
        """rope_parameters with an entry for each layer type; rope_theta and rope_scaling, as older configs have them,
        are of FULL layers alone."""
        fields = self.rope_parameters or {}
        default = {"rope_type": "default"}
        full = {"rope_theta": self.rope_theta, **(fields.get(FULL) or default), **(self.rope_scaling or {})}
        return {**fields, FULL: full, SLIDING: {"rope_theta": sliding_theta, **(fields.get(SLIDING) or default)}}

    @property
    def _has_rope_by_type(self) -> bool:
        return self.ROPE_BY_TYPE and any(kind in self.rope_fields for kind in self.types)

    def _scaling(self, parameters: Mapping[str, Any], original: int | None, sizes: Mapping[str, int]) -> RopeScaling:
        return RopeScaling(
            parameters,
            sizes["h"],
            self.max_position_embeddings,
            self.rope_theta,
            original,
            partial_rotary_factor=getattr(self, "partial_rotary_factor", None),
            also=self.ROPE_KEYS,
        )

    @property
    def max_positions(self) -> None:
        return None

    @property
    def unread(self) -> list[str]:
        if not self._has_rope_by_type:
            return [f"rope_parameters.{key}" for key in self.rope.unread]
        beside = [f"rope_parameters.{key}" for key in self.rope_fields if key not in (FULL, SLIDING)]
        return beside + [
            f"rope_parameters.{kind}.{key}"
            for kind, rope in self.ropes.items()
            if rope is not None
            for key in (*rope.unread, *({"truncate"} & set(self.rope_fields[kind])))
        ]

    @property
    def rotations(self) -> tuple[int, bool] | None:
        limits = {rope.rotations for rope in self.ropes.values() if rope is not None and rope.rotations}
        if not limits:
            return None
        lengths, by_length = zip(*limits, strict=True)
        return min(lengths), any(by_length) or len(limits) > 1


@dataclass(frozen=True)
class MultiHeadConfig(RopeConfig):
    """The fields of decoders with RoPE, whatever their attention and norms.

    Sizes have no defaults of their own here: a family's `Config` gives those of its HF class. A family that may have
    fewer key heads than query heads has a field `num_key_value_heads`, and one whose heads may be of any size a field
    `head_dim`, with HF's defaults.

    ACT:              the activations that it may have.
    HEADS_FILL_WIDTH: whether its heads are as wide together as the model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    ACT: ClassVar[Mapping[str, Any]] = ACT
    HEADS_FILL_WIDTH: ClassVar[bool] = False

    def __post_init__(self) -> None:
        family = self.MODEL_TYPE
        one_of(family, "hidden_act", self.hidden_act, self.ACT)
        d, n, h = (self.sizes[c] for c in "dnh")
        if getattr(self, "head_dim", None) is None:
            divisible(family, "hidden_size", d, "num_attention_heads", n)
        elif self.HEADS_FILL_WIDTH and n * h != d:
            raise ConfigError(f"{family}: num_attention_heads={n} of head_dim={h} make up {n * h}, not hidden_size={d}")
        for sizes in (self.sizes, *map(self.sizes_of, range(self.layers))):
            divisible(family, "num_attention_heads", sizes["n"], "num_key_value_heads", sizes["k"])
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k, h = getattr(self, "num_key_value_heads", None), getattr(self, "head_dim", None)
        k, h = n if k is None else k, d // n if h is None else h
        return dict(d=d, n=n, k=k, h=h, f=self.intermediate_size, v=self.vocab_size)


@dataclass(frozen=True)
class GroupedQueryConfig(MultiHeadConfig):
    """The fields of decoders with grouped-query attention (Ainslie et al., arXiv:2305.13245), whatever their norms."""

    num_key_value_heads: int | None = None
    head_dim: int | None = None

    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[Mapping[str, Any]] = {"rope_interleaved": False}


@dataclass(frozen=True)
class LlamaLikeConfig(GroupedQueryConfig):
    """The fields that these decoders share."""

    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(RopeConfig):
    """All layers attend to the last `sliding_window` positions; to all positions where it is null.

    WINDOWED: HF's type of layers with a window, and its name of the field.
    """

    sliding_window: int | None = None

    WINDOWED: ClassVar[tuple[str, str]] = (SLIDING, "sliding_window")

    @property
    def window(self) -> int | None:
        """That of layers of type WINDOWED."""
        return self.sliding_window

    @property
    def types(self) -> list[str]:
        return [FULL if self.window is None else self.WINDOWED[0]] * self.layers

    @property
    def windows(self) -> list[int | None]:
        """Raises ConfigError where a layer is WINDOWED and there is no window."""
        windowed, name = self.WINDOWED
        if self.window is None and windowed in self.types:
            raise ConfigError(
                f"{self.MODEL_TYPE}: layer_types has {windowed} and {name} is null or switched off; give it a number "
                f"of positions, or make all layers {FULL}"
            )
        return [self.window if kind == windowed else None for kind in self.types]


@dataclass(frozen=True, kw_only=True)
class LayerTypesConfig(SlidingWindowConfig):
    """The layers of which `layer_types` says so attend to a window; where it is null, those of `usual_types`."""

    layer_types: list[str] | None = None

    @property
    def usual_types(self) -> list[str]:
        """HF's value for null."""
        return [FULL] * self.layers

    @property
    def types(self) -> list[str]:
        """Raises ConfigError for other types than FULL and WINDOWED, and for more or fewer than there are layers."""
        types, windowed = self.usual_types if self.layer_types is None else self.layer_types, self.WINDOWED[0]
        if wrong := next((kind for kind in types if kind not in (FULL, windowed)), None):
            raise ConfigError(f"{self.MODEL_TYPE}: layer_types may hold {FULL} and {windowed}, and not {shown(wrong)}")
        if len(types) != self.layers:
            raise ConfigError(f"{self.MODEL_TYPE}: layer_types has {len(types)} entries for {self.layers} layers")
        return types


@dataclass(frozen=True, kw_only=True)
class MaxWindowLayersConfig(LayerTypesConfig):
    """The layers from `max_window_layers` on attend to a window, if `use_sliding_window`."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = field(default=28, metadata={"least": 0})

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    @property
    def usual_types(self) -> list[str]:
        first = self.layers if self.window is None else self.max_window_layers
        return [FULL if layer < first else SLIDING for layer in range(self.layers)]


@dataclass(frozen=True, kw_only=True)
class NoRopeLayersConfig(RopeConfig):
    """Some layers have no RoPE (Yang et al., arXiv:2501.18795): those with a 0 in `no_rope_layers`, or where that is
    null or empty, every `no_rope_layer_interval`-th."""

    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4

    def __post_init__(self) -> None:
        entries = self.no_rope_layers
        if entries and (len(entries) < self.layers or not all(entry in (0, 1) for entry in entries)):
            raise ConfigError(
                f"{self.MODEL_TYPE}: no_rope_layers={shown(entries)} should have an entry for each of {self.layers} "
                "layers, 1 for RoPE and 0 for none"
            )
        super().__post_init__()

    @property
    def rotates(self) -> list[bool]:
        """Whether each layer has RoPE."""
        if self.no_rope_layers:
            return [bool(entry) for entry in self.no_rope_layers[: self.layers]]
        return [(layer + 1) % self.no_rope_layer_interval != 0 for layer in range(self.layers)]


class LlamaLikeModel(CausalLM):
    """Its blocks take the rotation of heads besides the state.

    norm: by default RMSNorm, which a LlamaLikeConfig has. rope: by default the config's, of all layers.
    """

    def __init__(
        self,
        cfg: MultiHeadConfig,
        blocks: Iterable[nnx.Module],
        rngs: nnx.Rngs,
        *,
        norm: nnx.Module | None = None,
        rope: Any = None,
        soft_cap: float | None = None,
        head_bias: bool = False,
    ):
        if norm is None:
            norm = RMSNorm(cfg.hidden_size, cast(LlamaLikeConfig, cfg).rms_norm_eps)
        super().__init__(cfg, blocks, norm, rngs, soft_cap=soft_cap, head_bias=head_bias)
        self.rope: Any = cfg.rope if rope is None else rope

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return (self.rope(at),)


class ScaledModel(LlamaLikeModel):
    """Embeddings and logits are multiplied by scales (Yang et al., arXiv:2203.03466)."""

    def __init__(
        self,
        cfg: MultiHeadConfig,
        blocks: Iterable[nnx.Module],
        rngs: nnx.Rngs,
        *,
        embedding_scale: float,
        logits_scale: float,
    ):
        super().__init__(cfg, blocks, rngs)
        self.embedding_scale, self.logits_scale = embedding_scale, logits_scale

    def embed(self, tokens_bt: Array, at: Positions) -> Array:
        return super().embed(tokens_bt, at) * self.embedding_scale

    def logits(self, x_btd: Array) -> Array:
        return super().logits(x_btd) * self.logits_scale


class HeadsNormModel(LlamaLikeModel):
    """That of blocks with a jx_neuron.nn.sublayers.HeadsNormAttention; the row `key_head_numbers` fills `number_k`."""

    def __init__(self, cfg: MultiHeadConfig, blocks: Iterable[nnx.Module], rngs: nnx.Rngs):
        super().__init__(cfg, blocks, rngs)
        self.number_k = nnx.Param(jnp.zeros((cfg.sizes["k"],)))

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        return ((self.rope(at), head_copies(self.number_k[...])),)


EXTRA_TENSORS = (
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    Copy("lm_head.weight", of="model.embed_tokens.weight"),
)
"""Tensors that checkpoints may have besides the parameters: inverse frequencies in older ones, and a tied head."""


def _without_truncate(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of an entry for a layer type HF reads all but this, which it looks for next to the entries."""
    return {key: value for key, value in parameters.items() if key != "truncate"}


def full_every(period: int, layers: int) -> list[str]:
    """Types of layers of which each `period`-th sees all positions and the others a window (sliding_window_pattern)."""
    return [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(layers)]
