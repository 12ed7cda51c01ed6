"""Speculation under transformers-neuronx's names. `draft=` of `sample` and `generate` is the same, for any batch.

Drafts are accepted while they are what the target draws with its own uniform numbers. So answers are those of
`target.sample`, and `k` is the most tokens of a pass, of which fewer are taken where drafts are poor.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Self, Unpack, cast

import numpy as np

from jx_neuron.engine.drafting import Drafter, FeatureDrafter, Speculation
from jx_neuron.engine.options import Options
from jx_neuron.errors import ConfigError
from jx_neuron.llm.drafts import drafter_of
from jx_neuron.llm.model import NeuronAutoModelForCausalLM
from jx_neuron.util.arguments import integer


@dataclass(eq=False)
class AtMost:
    """The drafts of another drafter, of `most` tokens at most."""

    drafter: Drafter
    most: int

    @property
    def pause(self) -> int:
        """Of the other."""
        return self.drafter.pause

    def propose(self, rows: SequenceOf[Speculation]) -> SequenceOf[SequenceOf[int]]:
        for row in rows:
            row.wanted = min(row.wanted, self.most)
        return self.drafter.propose(rows)

    def close(self, row: Speculation) -> None:
        self.drafter.close(row)


class FeaturesAtMost(AtMost):
    """The same of a `FeatureDrafter`."""

    drafter: FeatureDrafter

    @property
    def taps(self) -> SequenceOf[int]:
        """Of the other."""
        return self.drafter.taps

    def take(self, row: Speculation, start: int, features_tid: np.ndarray) -> None:
        self.drafter.take(row, start, features_tid)

    def reserve(self, rows: int, positions: int) -> None:
        self.drafter.reserve(rows, positions)


class SpeculativeGenerator:
    """Samples from `target`, of which a pass verifies `k` tokens: k - 1 of `draft`, and the one before.

    draft:    what `generate` takes as draft: a model, "ngram", or a Drafter.
    acceptor: None: acceptance is exact.

    Raises ConfigError for another acceptor.
    """

    def __init__(self, draft: Any, target: NeuronAutoModelForCausalLM, k: int = 4, acceptor: Any = None):
        if acceptor is not None:
            raise ConfigError("acceptor may be None alone: a draft is accepted while it is what the target draws")
        self.draft, self.target, self.k = draft, target, integer("k", k, least=2, error=ConfigError)

    def sample(
        self,
        input_ids: Any,
        sequence_length: int | None = None,
        start_ids: Any = None,
        eos_token_id: int | SequenceOf[int] | None = None,
        streamer: Any = None,
        **options: Unpack[Options],
    ) -> Any:
        """`target.sample`, with drafts. `eos_token_id` is its eos_token_override."""
        if eos_token_id is not None:
            options["eos_token_override"] = eos_token_id
        drafter = drafter_of(self.draft, self.target)
        kind = FeaturesAtMost if isinstance(drafter, FeatureDrafter) else AtMost
        at_most = None if drafter is None else kind(drafter, self.k - 1)
        return self.target.sample(input_ids, sequence_length, start_ids, streamer=streamer, draft=at_most, **options)


class FusedSpeculativeDecoder:
    """The same, where `k` counts the tokens of a draft. Draft and target run as programs of their own.

    eos_token_id: what ends a row, instead of the target's.
    """

    def __init__(
        self,
        draft: NeuronAutoModelForCausalLM,
        target: NeuronAutoModelForCausalLM,
        k: int = 2,
        *,
        eos_token_id: int | SequenceOf[int] | None = None,
    ):
        self.draft, self.target, self.eos_token_id = draft, target, eos_token_id
        self._generator = SpeculativeGenerator(draft, target, integer("k", k, error=ConfigError) + 1)

    def to_neuron(self, workers: int | None = None) -> Self:
        """Readies both models. `workers` has no effect: `NeuronConfig(compilation_worker_count=…)` does the same.

        Raises ConfigError where the target has other programs already.
        """
        k = self._generator.k
        if self.target.backend != "xla" and k not in self.target.settings.speculation:
            self.target.enable_speculative_decoder(k)
        self.draft.to_neuron()
        self.target.to_neuron()
        return self

    def sample(
        self,
        input_ids: Any,
        start_ids: Any = None,
        attention_mask: Any = None,
        sequence_length: int | None = None,
        streamer: Any = None,
        **others: Any,
    ) -> Any:
        """`target.sample`, with drafts; `others` are of its options."""
        options = cast(Options, others if attention_mask is None else {**others, "attention_mask": attention_mask})
        return self._generator.sample(input_ids, sequence_length, start_ids, self.eos_token_id, streamer, **options)
