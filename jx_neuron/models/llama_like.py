"""The config of Llama and the decoders that descend from it, and what those with RoPE share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jx_neuron.checkpoint.hf_config import HFConfig, divisible, one_of
from jx_neuron.errors import ConfigError
from jx_neuron.nn.layers import ACT
from jx_neuron.nn.rope import RopeScaling

__all__ = ["LlamaLikeConfig", "RopeConfig"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig(HFConfig):
    """The fields of RoPE, as transformers 5 writes them and as older ones did."""

    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 10000.0
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_scaling and self.rope_parameters and self.rope_scaling != self.rope_parameters:
            raise ConfigError(f"{self.MODEL_TYPE}: rope_scaling and rope_parameters differ; keep the one that is meant")
        _ = self.rope

    @property
    def rotary(self) -> float | None:
        """The part of a head that is rotated where `rope_parameters` does not say; None where the whole always is."""
        return None

    @property
    def rope(self) -> RopeScaling:
        """Gives the rotation of a span. Raises ConfigError for what RoPE cannot have."""
        return RopeScaling(
            self.rope_scaling or self.rope_parameters or {},
            self.sizes["h"],
            self.max_position_embeddings,
            self.rope_theta,
            self.original_max_position_embeddings,
            self.rotary,
        )

    @property
    def max_positions(self) -> None:
        return None

    @property
    def unread(self) -> list[str]:
        return [f"rope_parameters.{key}" for key in self.rope.unread]

    @property
    def rotations(self) -> tuple[int, bool] | None:
        return self.rope.rotations


@dataclass(frozen=True)
class LlamaLikeConfig(RopeConfig):
    """The fields that these decoders share.

    Sizes have no defaults of their own here: a family's `Config` gives those of its HF class.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partial_rotary_factor": (1.0, None)}
    USUAL: ClassVar[Mapping[str, Any]] = {"rope_interleaved": False}

    def __post_init__(self) -> None:
        family = self.MODEL_TYPE
        one_of(family, "hidden_act", self.hidden_act, ACT)
        n, k, h = (self.sizes[c] for c in "nkh")
        if self.head_dim is None:
            divisible(family, "hidden_size", self.hidden_size, "num_attention_heads", n)
        divisible(family, "num_attention_heads", n, "num_key_value_heads", k)
        if h % 2:
            raise ConfigError(f"{family}: the head size {h} is odd, and RoPE rotates pairs; set an even head_dim")
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        d, n = self.hidden_size, self.num_attention_heads
        k = n if self.num_key_value_heads is None else self.num_key_value_heads
        h = d // n if self.head_dim is None else self.head_dim
        return dict(d=d, n=n, k=k, h=h, f=self.intermediate_size, v=self.vocab_size)
