"""Sampling options that calls do not give: those of the model's GenerationConfig, and its checkpoint's token ids."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jx_neuron.config import GenerationConfig
from jx_neuron.engine.options import Choice, Options, choices, pad_of
from jx_neuron.engine.processors import Constraint
from jx_neuron.errors import ConfigError
from jx_neuron.util.arguments import integers, shown


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling options that a model's calls fall back to.

    vocab_size:        the size of the vocabulary; token ids are below it.
    candidates:        the number of candidates that compiled programs sample from; None where programs are compiled on
                       demand.
    token_ids:         eos_token_id and pad_token_id of the checkpoint.
    generation_config: the model's own copy; None where there is none.

    Raises ConfigError for an end token that the vocabulary does not have.
    """

    vocab_size: int
    candidates: int | None
    token_ids: Mapping[str, Any]
    generation_config: GenerationConfig | None

    def __post_init__(self) -> None:
        config = copy.copy(self.generation_config)
        if config is not None and config.eos_token_id is not None:
            integers("eos_token_id", config.eos_token_id, least=-1, most=self.vocab_size - 1, error=ConfigError)
        object.__setattr__(self, "generation_config", config)

    def updated(self, generation_config: GenerationConfig) -> "SamplingDefaults":
        """A copy with another GenerationConfig. Raises ConfigError where the present one is not dynamic."""
        if not isinstance(generation_config, GenerationConfig):
            raise ConfigError(f"it takes a jx_neuron.GenerationConfig, and this is {shown(generation_config)}")
        if self.generation_config is not None and not self.generation_config.dynamic:
            raise ConfigError(
                "the model was made with a GenerationConfig that is not dynamic; "
                "make it with on_device_generation=GenerationConfig(dynamic=True, …) to change it later"
            )
        return replace(self, generation_config=generation_config)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row, without those outside the vocabulary."""
        generation_ids = self.generation_config.eos_token_id if self.generation_config else None
        ids = self.token_ids.get("eos_token_id") if generation_ids is None else generation_ids
        several = () if ids is None else np.atleast_1d(ids).tolist()
        return tuple(id for id in several if 0 <= id < self.vocab_size)

    @property
    def max_length(self) -> int | None:
        """The most tokens of prompt and answer; None where the GenerationConfig has no limit."""
        return self.generation_config.max_length if self.generation_config else None

    def pad_token_id(self, choice: Choice) -> int:
        """The token that fills a row once it has ended."""
        return pad_of(self.token_ids.get("pad_token_id"), choice.eos, self.vocab_size)

    def choices(
        self,
        options: Options,
        rows: int,
        steps: int,
        *,
        samples: bool,
        logprobs: int | None = None,
        grammar: Constraint | None = None,
    ) -> Sequence[Choice]:
        """The Choice of each row by `options`, with these defaults."""
        return choices(
            options,
            self.generation_config or GenerationConfig(do_sample=samples),
            rows,
            steps,
            vocab_size=self.vocab_size,
            compiled=self.candidates,
            eos=self.eos_token_ids,
            logprobs=logprobs,
            grammar=grammar,
        )
