"""The programs of an engine that serves, in the order in which they are loaded, and which runs until another is."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from jx_neuron.step.buckets import Buckets
from jx_neuron.step.program_key import Kind, ProgramKey

MOST = 96
"""Programs that are loaded; larger ones run in place of the others."""

KINDS: tuple[Kind, ...] = ("decode", "verify", "prefill", "score")


@dataclass(frozen=True)
class Readiness:
    """The programs of turns, `loaded` or not.

    first: the largest of each kind, which can run in place of any other; no turn waits once these are loaded.
    rest:  those of fewer rows, tokens or positions: short sequences first, and scores of prompts last.
    """

    first: SequenceOf[ProgramKey]
    rest: SequenceOf[ProgramKey]
    loaded: Callable[[ProgramKey], bool]

    @classmethod
    def of(
        cls,
        buckets: Buckets,
        batch_sizes: SequenceOf[int],
        prompt_rows: SequenceOf[int],
        chunk_sizes: SequenceOf[int],
        verify_sizes: SequenceOf[int],
        budget: int,
        candidates: int,
        loaded: Callable[[ProgramKey], bool],
        taps: tuple[int, ...] = (),
    ) -> "Readiness":
        """The programs of a scheduler with these sizes and a budget, which all draw from `candidates` tokens, and give
        what enters the layers `taps`."""
        least, whole = prompt_rows[0], [t for t in buckets.context if t > 1]
        several = [(rows, t, t) for rows in prompt_rows[1:] for t in whole if rows * t <= budget]
        one = [(least, t, t) for t in whole] + [(least, t, s) for t in chunk_sizes for s in buckets.tokens if s > t]
        keys = [ProgramKey("decode", rows, 1, s, candidates) for rows in batch_sizes for s in buckets.tokens]
        drafts = [(rows, t, s) for rows in batch_sizes for t in verify_sizes for s in buckets.tokens if s > t]
        keys += [ProgramKey("verify", *sizes, candidates) for sizes in drafts]
        keys += [ProgramKey("prefill", *sizes, candidates) for sizes in (*one, *several)]
        keys += [ProgramKey("score", *sizes, candidates) for sizes in one if sizes[1] == max(whole)]
        keys = [replace(key, taps=taps) for key in keys]
        first: list[ProgramKey] = []
        for kind in KINDS:
            rows = batch_sizes[-1] if kind in ("decode", "verify") else least
            alike = [key for key in keys if (key.kind, key.rows) == (kind, rows)]
            behind = [key for key in alike if key.positions > key.tokens]
            largest = [max(some, key=lambda key: (key.tokens, key.positions)) for some in (alike, behind) if some]
            first += dict.fromkeys(largest)
        rest = [key for key in keys if key not in first]
        shortest = buckets.tokens[0]

        def order(key: ProgramKey) -> tuple[bool, int, int, int]:
            return (
                key.kind == "score",
                max(key.positions, shortest),
                KINDS.index(key.kind),
                key.rows * key.tokens,
            )

        rest.sort(key=order)
        return cls(first, rest[: MOST - len(first)], loaded)

    def fitting(self, wanted: ProgramKey, *, behind: bool) -> ProgramKey | None:
        """A program that is loaded: `wanted`, or the smallest that has room for it; None where none has.

        behind: whether rows go on behind other tokens.
        """
        if self.loaded(wanted):
            return wanted
        roomy = [
            key
            for key in (*self.rest, *self.first)
            if key.kind == wanted.kind
            and key.rows >= wanted.rows
            and key.tokens >= wanted.tokens
            and key.positions >= wanted.positions
            and set(key.taps) >= set(wanted.taps)
            and not (behind and key.positions == key.tokens)
            and self.loaded(key)
        ]
        return min(roomy, key=lambda key: (key.rows * key.tokens, key.positions), default=None)
