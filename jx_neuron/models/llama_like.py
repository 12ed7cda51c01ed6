"""What Llama and the decoders that descend from it share, and the config of all that have RoPE."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from flax import nnx
from jax import Array

from jx_neuron.checkpoint.hf_config import FULL, HFConfig, divisible, one_of
from jx_neuron.checkpoint.weights import Copy
from jx_neuron.errors import ConfigError
from jx_neuron.nn.layers import ACT, Embedding, Layers, RMSNorm
from jx_neuron.nn.rope import RopeScaling, by_layer_type
from jx_neuron.nn.state import Positions, State
from jx_neuron.util.arguments import shown

__all__ = [
    "EXTRA_TENSORS",
    "FULL",
    "SLIDING",
    "GroupedQueryConfig",
    "LlamaLikeConfig",
    "LlamaLikeModel",
    "RopeConfig",
    "full_every",
    "layer_types",
    "layer_windows",
    "sliding_from",
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
        _ = self.ropes, self.windows

    @property
    def rope(self) -> RopeScaling:
        """Gives the rotation of a span, in layers of any type. Raises ConfigError for what RoPE cannot have."""
        return self._scaling(self.rope_fields, self.original_max_position_embeddings, None)

    @property
    def ropes(self) -> dict[str, RopeScaling | None]:
        """Those of each layer type; None where it has no positions."""
        types = list(dict.fromkeys(self.types))
        if not self._has_rope_by_type:
            return dict.fromkeys(types, self.rope)
        entries = by_layer_type(self.rope_fields, types)
        return {
            kind: None if entry is None else self._scaling(_without_truncate(entry), None, self.types.index(kind))
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

    def _scaling(self, parameters: Mapping[str, Any], original: int | None, layer: int | None) -> RopeScaling:
        return RopeScaling(
            parameters,
            self.sizes_of(layer)["h"],
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
class GroupedQueryConfig(RopeConfig):
    """The fields of decoders with grouped-query attention (Ainslie et al., arXiv:2305.13245), whatever their norms.

    Sizes have no defaults of their own here: a family's `Config` gives those of its HF class.

    ACT: the activations that it may have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[dict[str, Any]] = {"rope_interleaved": False}
    ACT: ClassVar[Mapping[str, Any]] = ACT

    def __post_init__(self) -> None:
        family = self.MODEL_TYPE
        one_of(family, "hidden_act", self.hidden_act, self.ACT)
        if self.head_dim is None:
            divisible(family, "hidden_size", self.hidden_size, "num_attention_heads", self.sizes["n"])
        for sizes in map(self.sizes_of, (None, *range(self.layers))):
            divisible(family, "num_attention_heads", sizes["n"], "num_key_value_heads", sizes["k"])
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k = n if self.num_key_value_heads is None else self.num_key_value_heads
        h = d // n if self.head_dim is None else self.head_dim
        return dict(d=d, n=n, k=k, h=h, f=self.intermediate_size, v=self.vocab_size)


@dataclass(frozen=True)
class LlamaLikeConfig(GroupedQueryConfig):
    """The fields that these decoders share."""

    rms_norm_eps: float = 1e-6


class LlamaLikeModel(nnx.Module):
    """Token embeddings, blocks, a last norm, and a head that may be tied to the embeddings.

    norm: by default RMSNorm, which a LlamaLikeConfig has. rope: by default the config's, of all layers.
    """

    def __init__(
        self,
        cfg: GroupedQueryConfig,
        blocks: Iterable[nnx.Module],
        rngs: nnx.Rngs,
        *,
        norm: nnx.Module | None = None,
        rope: Any = None,
    ):
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = Layers(blocks)
        if norm is None:
            norm = RMSNorm(cfg.hidden_size, cast(LlamaLikeConfig, cfg).rms_norm_eps)
        self.norm: Any = norm
        self.lm_head = None if cfg.tie_word_embeddings else Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.rope: Any = cfg.rope if rope is None else rope

    def __call__(self, tokens_bt: Array, state: State, at: Positions) -> tuple[Array, State]:
        x_btd, state = self.layers(self.embed(tokens_bt), state, at, *self.block_args(at))
        return self.norm(x_btd), state

    def embed(self, tokens_bt: Array) -> Array:
        """What enters the first block, [b, t, d]."""
        return self.embed_tokens(tokens_bt)

    def block_args(self, at: Positions) -> tuple[Any, ...]:
        """What every block takes beside the state: the rotation of heads."""
        return (self.rope(at),)

    def logits(self, x_btd: Array) -> Array:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(x_btd)


EXTRA_TENSORS = (
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    Copy("lm_head.weight", of="model.embed_tokens.weight"),
)
"""What checkpoints may hold beside the parameters: inverse frequencies that older ones carry, and a tied head."""


def _without_truncate(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of an entry for a layer type HF reads all but this, which it looks for beside the entries."""
    return {key: value for key, value in parameters.items() if key != "truncate"}


def full_every(period: int, layers: int) -> list[str]:
    """Types of layers of which each `period`-th sees all positions and the others a window (sliding_window_pattern)."""
    return [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(layers)]


def sliding_from(first: int, layers: int) -> list[str]:
    """Types of layers of which those from `first` on see a window (max_window_layers)."""
    return [FULL if layer < first else SLIDING for layer in range(layers)]


def layer_types(config: HFConfig, types: Sequence[str] | None, usual: Iterable[str]) -> list[str]:
    """HF's `layer_types`, or where it is null the `usual` ones: FULL or SLIDING for each layer.

    Raises ConfigError for others, and for more or fewer than there are layers.
    """
    types = list(usual) if types is None else list(types)
    if wrong := next((kind for kind in types if kind not in (FULL, SLIDING)), None):
        raise ConfigError(f"{config.MODEL_TYPE}: layer_types may hold {FULL} and {SLIDING}, and not {shown(wrong)}")
    if len(types) != config.layers:
        raise ConfigError(f"{config.MODEL_TYPE}: layer_types has {len(types)} entries for {config.layers} layers")
    return types


def layer_windows(config: HFConfig, types: Sequence[str], window: int | None) -> list[int | None]:
    """How many positions the layers of each type attend to: `window` where they are SLIDING, and None for all.

    Raises ConfigError where a layer is sliding and there is no window.
    """
    if window is None and SLIDING in types:
        raise ConfigError(
            f"{config.MODEL_TYPE}: layer_types has {SLIDING} and sliding_window is null or switched off; give it a "
            f"number of positions, or make all layers {FULL}"
        )
    return [window if kind == SLIDING else None for kind in types]
