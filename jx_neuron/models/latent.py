"""Parts of decoders with latent attention: the fields that give its sizes, and the rows of its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import MultiHeadConfig
from jx_neuron.models.rows import column_parallel, ours, rms_norm, row_parallel
from jx_neuron.nn.rope import RopeScaling
from jx_neuron.nn.sharding import AXIS

__all__ = ["LatentConfig", "latent_attention"]


@dataclass(frozen=True)
class LatentConfig(MultiHeadConfig):
    """The fields of latent attention (DeepSeek-AI, arXiv:2405.04434); sizes are by jx_neuron.nn.latent_attention's
    letters, and h that of a query."""

    num_key_value_heads: int | None = None
    rotated: int | None = field(default=None, metadata={"hf": "head_dim"})
    attention_bias: bool = False
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6

    ROPE_KEYS = frozenset({"mscale_all_dim"})
    # of training, of other ways to split the work, and what follows from other fields
    UNREAD: ClassVar[frozenset[str]] = frozenset("aux_loss_alpha ep_size pretraining_tp qk_head_dim seq_aux".split())

    def __post_init__(self) -> None:
        n, k, u = self.num_attention_heads, self.num_key_value_heads, self.qk_rope_head_dim
        if k not in (None, n):
            raise ConfigError(f"{self.MODEL_TYPE}: num_key_value_heads={k} should be num_attention_heads={n}, or null")
        if self.rotated not in (None, u):
            raise ConfigError(f"{self.MODEL_TYPE}: head_dim={self.rotated} should be qk_rope_head_dim={u}, or null")
        super().__post_init__()

    @property
    def head_dim(self) -> int:
        """The size of a query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def sizes(self) -> dict[str, int]:
        ranks = dict(q=self.q_lora_rank or 1, r=self.kv_lora_rank)
        return super().sizes | ranks | dict(c=self.qk_nope_head_dim, u=self.qk_rope_head_dim, o=self.v_head_dim)

    @property
    def scale(self) -> float:
        """Of scores: 1/√h, times the square of YaRN's factor of all dimensions."""
        rope, weight = self.rope, self.rope.parameters.get("mscale_all_dim")
        return (rope.mscale(weight) if weight and rope.kind != "default" else 1.0) ** 2 / math.sqrt(self.head_dim)

    def _scaling(self, parameters: Mapping[str, Any], original: int | None, sizes: Mapping[str, int]) -> RopeScaling:
        return super()._scaling(parameters, original, {**sizes, "h": sizes["u"]})


def latent_attention(source: str) -> tuple[W, ...]:
    """The projections of a jx_neuron.nn.latent_attention.LatentAttention."""
    target = ours(source)
    down, kv_a, kv_b = f"{target}.down", f"{source}.kv_a_proj_with_mqa", f"{source}.kv_b_proj.weight"
    return (
        *column_parallel(f"{source}.q_proj", f"{target}.q_proj", "n h", bias=False),
        W(f"{source}.q_a_proj.weight", f"{down}.q.kernel", "q d -> d q"),
        W(f"{source}.q_a_proj.bias", f"{down}.q.bias", "q -> q"),
        rms_norm(f"{source}.q_a_layernorm", width="q"),
        W(f"{source}.q_b_proj.weight", f"{target}.q_b_proj.kernel", "(n h) q -> q n h", P(None, AXIS)),
        W(f"{kv_a}.weight", f"{down}.latent.kernel", "([r] + u) d -> d r"),
        W(f"{kv_a}.weight", f"{down}.rope.kernel", "(r + [u]) d -> d u"),
        W(f"{kv_a}.bias", f"{down}.latent.bias", "([r] + u) -> r"),
        W(f"{kv_a}.bias", f"{down}.rope.bias", "(r + [u]) -> u"),
        rms_norm(f"{source}.kv_a_layernorm", width="r"),
        W(kv_b, f"{target}.k_b_proj", "(n ([c] + o)) r -> n c r", P(AXIS)),
        W(kv_b, f"{target}.v_b_proj", "(n (c + [o])) r -> n o r", P(AXIS)),
        *row_parallel(f"{source}.o_proj", f"{target}.o_proj", "n o"),
    )
