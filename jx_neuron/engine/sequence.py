"""Sequences of tokens, and the steps that compute them: plain data.

A sequence is tokens of which a slot of the state table holds the first `computed`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jx_neuron.engine.drafting import Speculation
from jx_neuron.step.step_input import Drawing, StepInput


@dataclass(eq=False)
class Sequence:
    """The tokens of a sequence, and how far they are computed.

    tokens:       known ones: given, or drawn and read.
    prompt:       how many were given at first.
    limit:        most tokens that it may have after drawing; no more than `prompt` for one that draws none.
    drawing:      how programs draw; None where they do not: the host chooses, or nobody does.
    every_logits: the logits of every token are wanted, not only of the last.
    adapter:      the number of its adapter; 0 for none. What another adapter computed is of no use to it.
    source:       a sequence that begins with the same tokens, to copy them from.
    extents:      of each given token, the length of the sequence that it was computed in, which RoPE may depend on.
    computed:     how many tokens the slot holds, or will once the steps under way have run.
    cached:       how many of them it took from what slots held when it was given its slot.
    written:      how many it held at most; more than `computed` where tokens were forgotten since.
    pending:      how many tokens were drawn and are not known yet.
    sink:         who takes what steps give for it: a `Sink` of jx_neuron.engine.engine.
    speculation:  how its drafts are made; None for none.
    again:        whether the next step begins where the last one did, which verified a draft: recurrent layers take
                  that step's state back.
    draft:        tokens that may follow, for the next decode step to verify.
    """

    tokens: list[int]
    limit: int = 0
    drawing: Drawing | None = None
    every_logits: bool = False
    source: "Sequence | None" = None
    adapter: int = 0
    extents: list[int] = field(default_factory=list)
    prompt: int = 0
    sink: Any = None
    slot: int | None = None
    computed: int = 0
    cached: int = 0
    written: int = 0
    pending: int = 0
    used: int = 0
    speculation: Speculation | None = None
    again: bool = False
    draft: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = self.prompt or len(self.tokens)
        self.extents = self.extents or [self.prompt] * self.prompt

    @property
    def length(self) -> int:
        """Tokens, including the ones that are not known yet."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens that are not computed yet; none where it draws and has reached its maximum."""
        full = self.drawing is not None and self.length >= self.limit
        return 0 if full else self.length - self.computed

    def extend(self, tokens: Iterable[int]) -> None:
        """Puts given tokens at the end."""
        self.tokens.extend(tokens)
        self.extents += [len(self.tokens)] * (len(self.tokens) - len(self.extents))

    def fork(self) -> "Sequence":
        """Another that begins with the same tokens, which are copied where they can be."""
        return Sequence(
            list(self.tokens),
            source=self,
            adapter=self.adapter,
            extents=list(self.extents),
            prompt=self.prompt,
            sink=self.sink,
        )

    def crop(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        del self.tokens[length:], self.extents[length:]
        self.computed, self.prompt = min(self.computed, length), min(self.prompt, length)


@dataclass(frozen=True)
class Row:
    """One row of a step: `count` tokens of a sequence from `start` on; `last` where these reach its end."""

    index: int
    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Turn:
    """One step and its rows."""

    step: StepInput
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """The next work: copies (source slot, target slot) in order, then steps in order."""

    copies: tuple[tuple[int, int], ...]
    turns: tuple[Turn, ...]
