"""What a request forbids or permits, as a grammar of the engine: logits that it disallows become -inf."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from jx_neuron.engine.grammar import Grammar


@dataclass
class Constraints:
    """Limits of one answer's tokens, besides a grammar.

    grammar:    None for none.
    allowed:    the only tokens that may be drawn; None for all.
    ends:       tokens that may not be drawn among the first `min_tokens`.
    bad_words:  sequences of tokens that may not be drawn.
    """

    grammar: Grammar | None = None
    allowed: np.ndarray | None = None
    ends: Sequence[int] = ()
    min_tokens: int = 0
    bad_words: Sequence[Sequence[int]] = ()
    answer: list[int] = field(default_factory=list)

    def copy(self) -> Self:
        """A copy that goes on alone."""
        grammar = None if self.grammar is None else self.grammar.copy()
        return replace(self, grammar=grammar, answer=list(self.answer))

    def accept(self, token: int) -> None:
        """Takes the token that was drawn."""
        self.answer.append(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    def mask_logits(self, logits_v: np.ndarray) -> np.ndarray:
        """Logits [v] of the next token. Where nothing would be left, the tokens that `grammar` permits are."""
        if self.grammar is not None:
            logits_v = self.grammar.mask_logits(logits_v)
        masked_v = logits_v.copy()
        if self.allowed is not None:
            masked_v[~self.allowed] = -np.inf
        if len(self.answer) < self.min_tokens:
            masked_v[list(self.ends)] = -np.inf
        for *before, last in self.bad_words:
            if self.answer[len(self.answer) - len(before) :] == before:
                masked_v[last] = -np.inf
        return masked_v if np.isfinite(masked_v).any() else logits_v
