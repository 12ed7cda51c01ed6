"""Parts of decoders whose blocks have experts next to a dense MLP (Gemma 4).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma4/modeling_gemma4.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.mixture import TRAINING, router, stacked_experts
from jx_neuron.models.rows import rms_norm
from jx_neuron.nn.experts import Experts, Router, take
from jx_neuron.nn.layers import RMSNorm

__all__ = ["ExpertsBeside", "ExpertsBesideConfig", "experts_beside"]


@dataclass(frozen=True, kw_only=True)
class ExpertsBesideConfig(RopeConfig):
    """Every layer has experts next to its MLP where `enable_moe_block`, which needs the other fields."""

    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None

    INERT: ClassVar[frozenset[str]] = TRAINING

    def __post_init__(self) -> None:
        super().__post_init__()
        experts, chosen, width = self.num_experts, self.top_k_experts, self.moe_intermediate_size
        if self.enable_moe_block and not (experts and chosen and width and chosen <= experts):
            raise ConfigError(
                f"{self.MODEL_TYPE}: num_experts={experts}, top_k_experts={chosen} and moe_intermediate_size={width} "
                "should be numbers with enable_moe_block, the second at most the first"
            )

    @property
    def chosen(self) -> int | None:
        """How many experts a token has."""
        return self.top_k_experts if self.enable_moe_block else None

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | dict(e=self.num_experts or 1, m=self.moe_intermediate_size or 1)


class ScaledRouter(Router):
    """Reads a norm of what enters it, over √d, and multiplies the weights of each expert by a scale of its own."""

    def __init__(self, sizes: Mapping[str, int], chosen: int, eps: float, rngs: nnx.Rngs):
        super().__init__(sizes, chosen, normalize=True, rngs=rngs)
        self.norm, self.factor = RMSNorm(sizes["d"], eps), sizes["d"] ** -0.5
        self.expert_scale = nnx.Param(jnp.ones((sizes["e"],)))

    def __call__(self, x_btd: Array) -> tuple[Array, Array]:
        weight_btc, index_btc = super().__call__(self.norm(x_btd) * self.factor)
        return weight_btc * take(self.expert_scale[...], index_btc), index_btc


class ExpertsBeside(nnx.Module):
    """mlp_norm(what an MLP gives) + output_norm(experts(input_norm(x))), where x enters the norm before the MLP."""

    def __init__(self, sizes: Mapping[str, int], chosen: int, act: str, eps: float, rngs: nnx.Rngs):
        self.router = ScaledRouter(sizes, chosen, eps, rngs)
        self.experts = Experts(sizes, act, rngs=rngs)
        self.mlp_norm, self.input_norm, self.output_norm = (RMSNorm(sizes["d"], eps) for _ in range(3))

    def __call__(self, x_btd: Array, mlp_btd: Array) -> Array:
        y_btd = self.experts(self.input_norm(x_btd), *self.router(x_btd))
        return self.mlp_norm(mlp_btd) + self.output_norm(y_btd)


def experts_beside(layer: str) -> tuple[W, ...]:
    """The rows of an `ExpertsBeside` named beside; HF's names begin with `layer`."""
    own = "layers.{i}.beside."
    return (
        router(layer + "router.proj", own + "router"),
        W(layer + "router.scale", own + "router.norm.scale", "d -> d"),
        W(layer + "router.per_expert_scale", own + "router.expert_scale", "e -> e"),
        *stacked_experts(layer + "experts.gate_up_proj", layer + "experts.down_proj", own + "experts"),
        rms_norm(layer + "post_feedforward_layernorm_1", own + "mlp_norm"),
        rms_norm(layer + "pre_feedforward_layernorm_2", own + "input_norm"),
        rms_norm(layer + "post_feedforward_layernorm_2", own + "output_norm"),
    )
