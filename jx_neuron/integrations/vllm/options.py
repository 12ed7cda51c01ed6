"""The options of this package that vLLM has none for: `--additional-config` as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from jx_neuron.config import KVCacheQuantizationConfig, NeuronConfig, QuantizationConfig
from jx_neuron.errors import ConfigError
from jx_neuron.runtime.deployment import choose_backend
from jx_neuron.util.arguments import flag, integer

CONTEXT = (32, 128)
"""Tokens of a prompt that a step takes on a CPU."""


@dataclass(frozen=True)
class PluginOptions:
    """Options of `from_pretrained` besides vLLM's own.

    backend, context_length_estimate, adapter: those of `NeuronAutoModelForCausalLM.from_pretrained`.
    quant:                                     int8, fp8 or int4: how weights are stored.
    kv_quant:                                  s8, f8e4m3fn, f16 or bf16: how keys and values are stored.
    output_all_logits:                         has compiled programs made that `prompt_logprobs` takes; with backend
                                               "xla" there are always some.
    tp_degree:                                 vLLM's --tensor-parallel-size.

    Raises ConfigError for a value that is not legal.
    """

    backend: str | None = None
    context_length_estimate: int | tuple[int, ...] | None = None
    adapter: str | None = None
    quant: str | None = None
    kv_quant: str | None = None
    output_all_logits: bool = False
    tp_degree: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", choose_backend(self.backend))
        integer("tp_degree", self.tp_degree, error=ConfigError)
        flag("output_all_logits", self.output_all_logits, error=ConfigError)
        _ = self.neuron_config

    @classmethod
    def of(cls, additional: Any) -> "PluginOptions":
        """Reads vLLM's additional_config. Raises ConfigError, which lists the legal names, for another."""
        names = [field.name for field in fields(cls)]
        if not isinstance(additional, Mapping) or (unknown := sorted(set(additional) - set(names))):
            what = f"has no {unknown[0]!r}" if isinstance(additional, Mapping) else "takes a JSON object"
            raise ConfigError(f"--additional-config {what}; of jx_neuron it has {', '.join(names)}")
        return cls(**additional)

    def with_degree(self, tp_degree: int) -> "PluginOptions":
        """These options with another tensor-parallel degree."""
        return replace(self, tp_degree=tp_degree)

    def as_dict(self) -> dict[str, Any]:
        """The options that `of` reads."""
        return asdict(self)

    @property
    def scores(self) -> bool:
        """Whether programs give the logits of a prompt's every token."""
        return self.output_all_logits or self.backend == "xla"

    @property
    def neuron_config(self) -> NeuronConfig:
        """Options of the lowered model."""
        return NeuronConfig(
            quant=None if self.quant is None else QuantizationConfig.named(self.quant),
            kv_cache_quant=None if self.kv_quant is None else KVCacheQuantizationConfig(self.kv_quant),
            output_all_logits=self.output_all_logits,
        )
