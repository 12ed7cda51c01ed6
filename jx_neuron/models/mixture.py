"""Parts of decoders with experts: the fields that give their sizes, and the rows of their weights."""

from dataclasses import dataclass
from typing import ClassVar

from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.hf_config import divisible
from jx_neuron.checkpoint.weights import W
from jx_neuron.errors import ConfigError
from jx_neuron.models.llama_like import RopeConfig
from jx_neuron.models.rows import gated_mlp
from jx_neuron.nn.sharding import AXIS

__all__ = [
    "IN",
    "OUT",
    "TRAINING",
    "ExpertsConfig",
    "GroupedExpertsConfig",
    "SharedExpertConfig",
    "SparseStepConfig",
    "correction",
    "experts",
    "granite_experts",
    "qwen_experts",
    "router",
    "stacked_experts",
]

TRAINING = frozenset("output_router_logits router_aux_loss_coef router_jitter_noise".split())
"""Fields that balance experts in training."""

IN, OUT = P(None, None, AXIS), P(None, AXIS, None)
"""How kernels [e, d, m] into experts and [e, m, d] out of them are split: by the width of each expert."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(RopeConfig):
    """EXPERTS: HF's fields of the number of experts, of how many are chosen for a token, and of the width of each."""

    EXPERTS: ClassVar[tuple[str, str, str]] = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen > self.sizes["e"]:
            experts, chosen, _ = self.EXPERTS
            raise ConfigError(
                f"{self.MODEL_TYPE}: {chosen}={self.chosen} is more than {experts}={self.sizes['e']}; lower it"
            )

    @property
    def chosen(self) -> int:
        """How many experts a token has."""
        return int(getattr(self, self.EXPERTS[1]))

    @property
    def sizes(self) -> dict[str, int]:
        experts, _, width = self.EXPERTS
        return super().sizes | dict(e=getattr(self, experts), m=getattr(self, width))


@dataclass(frozen=True, kw_only=True)
class SparseStepConfig(ExpertsConfig):
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""

    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = False

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and no dense MLP."""
        return layer not in (self.mlp_only_layers or ()) and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class GroupedExpertsConfig(ExpertsConfig):
    """DeepSeek's mixture (arXiv:2401.06066): the first layers are dense. The others have experts, in groups, and shared
    ones of all tokens, which are one wide MLP.

    BEST: how many of its experts' scores rank a group.
    """

    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    first_k_dense_replace: int
    n_group: int | None
    topk_group: int | None

    EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    BEST: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        count, taken = self.groups
        divisible(self.MODEL_TYPE, "n_routed_experts", self.n_routed_experts, "n_group", count)
        group = self.n_routed_experts // count
        if not taken <= count or group < self.BEST or self.chosen > taken * group:
            raise ConfigError(
                f"{self.MODEL_TYPE}: topk_group={taken} of n_group={count} groups of {group} experts is not legal for "
                f"num_experts_per_tok={self.chosen}; a group has {self.BEST} experts or more, and topk_group "
                "groups as many as a token has"
            )

    @property
    def groups(self) -> tuple[int, int]:
        """How many groups there are, and of how many a token's experts are."""
        return self.n_group or 1, self.topk_group or 1

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and no dense MLP."""
        return layer >= self.first_k_dense_replace

    def sizes_of(self, layer: int) -> dict[str, int]:
        shared = self.moe_intermediate_size * self.n_shared_experts
        return self.sizes | dict(f=shared if self.has_experts(layer) else self.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class SharedExpertConfig(SparseStepConfig):
    """Layers with experts have one of every token too, and the others a dense MLP."""

    intermediate_size: int
    shared_expert_intermediate_size: int

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | dict(one=1)

    def sizes_of(self, layer: int) -> dict[str, int]:
        width = self.shared_expert_intermediate_size if self.has_experts(layer) else self.intermediate_size
        return self.sizes | dict(f=width)


def router(source: str, target: str) -> W:
    """The logits of a jx_neuron.nn.experts.Router."""
    return W(f"{source}.weight", f"{target}.logits.kernel", "e d -> d e")


def correction(source: str, target: str) -> W:
    """The correction bias of a jx_neuron.nn.experts.Router. It stays exact: 16 bits would tie scores."""
    return W(source, f"{target}.correction", "e -> e", exact=True)


def experts(
    source: str, target: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[W, ...]:
    """The projections of jx_neuron.nn.experts.Experts, of which HF has tensors of each expert, with these names."""
    of = f"{source}.{{e}}"
    return (
        W(f"{of}.{gate}.weight", f"{target}.gate_proj.kernel", "m d -> e d m", IN),
        W(f"{of}.{up}.weight", f"{target}.up_proj.kernel", "m d -> e d m", IN),
        W(f"{of}.{down}.weight", f"{target}.down_proj.kernel", "d m -> e m d", OUT),
    )


def stacked_experts(gate_up: str, down: str, target: str, *, transposed: bool = False) -> tuple[W, ...]:
    """The same of two tensors of all experts, as transformers 5 has them in memory, with these names.

    transposed: their last axes are of outputs, not of inputs.
    """
    gate, up, out = "e ([m] + m) d", "e (m + [m]) d", "e d m"
    if transposed:
        gate, up, out = "e d ([m] + m)", "e d (m + [m])", "e m d"
    return (
        W(gate_up, f"{target}.gate_proj.kernel", f"{gate} -> e d m", IN),
        W(gate_up, f"{target}.up_proj.kernel", f"{up} -> e d m", IN),
        W(down, f"{target}.down_proj.kernel", f"{out} -> e m d", OUT),
    )


def granite_experts(source: str, target: str) -> tuple[W, ...]:
    """Router and experts of a jx_neuron.nn.experts.MoE, as Granite's files have them and as transformers 5 has them in
    memory."""
    return (
        router(f"{source}.router.layer", f"{target}.gate"),
        *stacked_experts(f"{source}.input_linear.weight", f"{source}.output_linear.weight", f"{target}.experts"),
        router(f"{source}.router", f"{target}.gate"),
        *stacked_experts(f"{source}.experts.gate_up_proj", f"{source}.experts.down_proj", f"{target}.experts"),
    )


def qwen_experts(source: str, target: str) -> tuple[W, ...]:
    """Router, experts and SharedExpert of a jx_neuron.nn.experts.MoE, as Qwen's files have them and as transformers 5
    has them in memory; the letter `one` is of size 1."""
    return (
        router(f"{source}.gate", f"{target}.gate"),
        *experts(f"{source}.experts", f"{target}.experts"),
        *stacked_experts(f"{source}.experts.gate_up_proj", f"{source}.experts.down_proj", f"{target}.experts"),
        *gated_mlp(f"{source}.shared_expert", f"{target}.shared_expert", bias=False),
        W(f"{source}.shared_expert_gate.weight", f"{target}.shared_expert.gate.kernel", "one d -> d one"),
    )
