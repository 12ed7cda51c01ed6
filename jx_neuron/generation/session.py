"""Rows of tokens in a model's cache: put there, continued, reordered, and padded to a compiled batch within."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.generation.chunks import Call, Rows, continued_calls, prefill_calls
from jx_neuron.generation.draw import Draw, idle
from jx_neuron.lowering.buckets import Buckets, fit
from jx_neuron.lowering.shape import Shape
from jx_neuron.runtime import Result, Runtime


@dataclass(frozen=True)
class Prefix:
    """Tokens whose keys and values are kept aside, in a cache of the runtime's."""

    tokens: np.ndarray
    cache: Any

    def begins(self, rows: Rows) -> bool:
        """Whether every row starts with it."""
        return all(np.array_equal(row[: len(self.tokens)], self.tokens) for row in rows)


@dataclass
class Engine:
    """A model's runtime and what its programs take. Its cache is that of one session at a time, the `holder`.

    batch_sizes:   rows that programs were made for, ascending; fewer are padded.
    prompt_batch:  rows of programs that take prompts, where they are others.
    """

    runtime: Runtime
    buckets: Buckets
    batch_sizes: Sequence[int]
    prompt_batch: int | None
    vocab_size: int
    prefix: Prefix | None = None
    holder: "weakref.ref[Session] | None" = None

    @property
    def copies(self) -> int:
        """How many answers each prompt is given."""
        return self.batch_sizes[-1] // self.prompt_batch if self.prompt_batch else 1

    @property
    def most_prompts(self) -> int:
        """How many prompts go through at once."""
        return self.prompt_batch or self.batch_sizes[-1]

    @property
    def chunk_sizes(self) -> Sequence[int]:
        """Query tokens of programs that may start behind others."""
        chunks = self.buckets.context if self.runtime.candidates is None else self.buckets.context[-1:]
        return sorted({1, *chunks})

    @property
    def greedy_candidates(self) -> int:
        """Candidates of a program whose logits alone are asked for."""
        return self.runtime.candidates or 1

    def keep_prefix(self, tokens: np.ndarray) -> None:
        """Computes `tokens` and keeps them for the prompts that start with them."""
        self.prefix = None
        Session(self, [tokens]).prefill()
        self.prefix, self.holder = Prefix(tokens, self.runtime.keep()), None


class Session:
    """`rows` of tokens, each `copies` times over, in a model's cache.

    start_b [batch] is where each row's next token will stand; its first `count` rows are those asked for.

    Sessions may take turns: the cache of one is set aside when another goes on. InputError is raised where one would go
    on whose cache is lost, as it was interrupted, or another began from it.
    """

    def __init__(self, engine: Engine, rows: Rows, copies: int = 1, start_b: np.ndarray | None = None):
        """`start_b` [count], where given, says how much each row holds of what the last session left."""
        self._engine, self._rows, self.copies, self.count = engine, rows, copies, len(rows) * copies
        self._kept: Any = None
        if start_b is None:
            start_b = np.zeros(self.count, np.int32)
        else:
            engine.holder = weakref.ref(self)
        self.start_b = np.pad(start_b, (0, self._batch(self.count) - self.count))

    def prefill(self, draw: Draw | None = None, *, goes_on: bool = False) -> Result:
        """Fills the cache; the next token, as `draw` says, and the last logits of each prompt and of padding.

        Where it `goes_on`, the program of the token after that is made ready meanwhile.
        """
        for _, result in self.prefill_chunks(draw, goes_on=goes_on):  # noqa: B007
            pass
        return result

    def prefill_chunks(
        self, draw: Draw | None = None, *, all_logits: bool = False, goes_on: bool = False
    ) -> Iterator[tuple[Call, Result]]:
        """The same call by call, with the logits of every token where asked."""
        self._enter(fresh=True)
        engine = self._engine
        batch = engine.prompt_batch or self._batch(len(self._rows))
        rows = [*self._rows, *[self._rows[0][:1]] * (batch - len(self._rows))]
        held, sizes = self._held(batch), None
        if held:
            sizes = [size for size in engine.chunk_sizes if size in engine.buckets.context]
        inputs = idle(batch, engine.greedy_candidates) if draw is None else draw.inputs(batch)
        count = engine.greedy_candidates if draw is None else draw.candidates
        calls = list(prefill_calls(rows, engine.buckets, held, sizes))
        if not held:
            shapes = [call.shape(count, all_logits) for call in calls]
            following = Shape(self._batch(self.count), 1, engine.buckets.slots(max(map(len, rows)) + 1), count)
            engine.runtime.compile([*shapes, following] if goes_on else shapes)
        yield from self._run(calls, inputs, count, all_logits)
        self.start_b = np.array([len(row) for row in rows], np.int32)
        if engine.prompt_batch:
            self._take(np.minimum(np.arange(self._batch(self.count)) // self.copies, len(rows) - 1))

    def decode(self, token_b1: Any, draw: Draw | None = None) -> Result:
        """One token more of each row: [batch, 1], such as a result holds, or [count]."""
        batch, engine = len(self.start_b), self._engine
        if isinstance(token_b1, np.ndarray) and token_b1.ndim == 1:
            token_b1 = np.pad(token_b1.astype(np.int32), (0, batch - len(token_b1)))[:, None]
        slots = engine.buckets.slots(int(self.start_b.max()) + 1)
        call = Call(token_b1, self.start_b, np.ones_like(self.start_b), slots)
        inputs = idle(batch, engine.greedy_candidates) if draw is None else draw.inputs(batch)
        count = engine.greedy_candidates if draw is None else draw.candidates
        ((_, result),) = self._run([call], inputs, count)
        self.start_b = self.start_b + 1
        return result

    def extend(self, tokens_nt: np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Puts tokens [count, t] behind what each row holds.

        Returns logits float32 [count, t, v], or of the last alone, [count, 1, v].

        Raises InputError where they exceed the capacity.
        """
        engine, (_, length) = self._engine, tokens_nt.shape
        if (end := int(self.start_b.max()) + length) > engine.buckets.capacity:
            raise InputError(
                f"{end} positions were asked for, and the model was made for n_positions={engine.buckets.capacity}; "
                "ask for fewer, or make the model with a larger n_positions"
            )
        tokens_bt = np.pad(tokens_nt, ((0, len(self.start_b) - self.count), (0, 0)))
        calls = continued_calls(tokens_bt, self.start_b, engine.buckets, engine.chunk_sizes)
        inputs = idle(len(self.start_b), engine.greedy_candidates)
        every = self._gather(self._run(calls, inputs, engine.greedy_candidates, all_logits), self.start_b, length)
        self.start_b = self.start_b + np.int32(length)
        return every if all_logits else every[:, -1:]

    def logits(self, all_logits: bool = False) -> np.ndarray:
        """Fills the cache; logits float32 [count, v] of each row's last token, or of all, [count, t, v]."""
        if not all_logits:
            return self.first(self.prefill())
        first_b = np.zeros_like(self.start_b)
        return self._gather(self.prefill_chunks(all_logits=True), first_b, max(map(len, self._rows)))

    def last(self, result: Result) -> np.ndarray:
        """What `decode` gave as logits, without padding: float32 [count, v]."""
        return np.asarray(result.logits_bv)[: self.count, : self._engine.vocab_size]

    def first(self, result: Result) -> np.ndarray:
        """What `prefill` gave as logits, without padding, each prompt's for each copy: float32 [count, v]."""
        return np.repeat(self.last(result)[: len(self._rows)], self.copies, axis=0)

    def _gather(self, ran: Iterable[tuple[Call, Result]], first_b: np.ndarray, length: int) -> np.ndarray:
        """The logits of calls that begin at `first_b`, put together: [rows, length, v], 0 where they were not asked."""
        every = np.zeros((len(self._rows), length, self._engine.vocab_size), np.float32)
        for call, result in ran:
            logits = np.asarray(result.logits_bv)[..., : self._engine.vocab_size]
            valid_b = np.minimum(call.length_b, call.tokens_bt.shape[1])
            for into, row, start, valid in zip(every, logits, call.start_b - first_b, valid_b, strict=False):
                if row.ndim == 2:
                    into[start : start + valid] = row[:valid]
                else:
                    into[start + valid - 1] = row
        return every

    def reorder(self, index_n: np.ndarray) -> None:
        """Row i goes on from what row `index_n[i]` held."""
        rest = np.arange(len(index_n), len(self.start_b))
        self._take(np.concatenate([index_n, rest]))

    def crop(self, tokens: int) -> None:
        """Forgets each row's last `tokens` tokens."""
        self.start_b = np.maximum(self.start_b - tokens, 0)

    def _take(self, index_b: np.ndarray) -> None:
        self._enter()
        self._engine.runtime.reorder(index_b.astype(np.int32))
        self.start_b = self.start_b[index_b]

    def _held(self, batch: int) -> int:
        prefix = self._engine.prefix
        if prefix is None or not prefix.begins(self._rows):
            longest = max(map(len, self._rows))
            self._engine.runtime.reset(self._engine.buckets.slots(min(longest + 1, self._engine.buckets.capacity)))
            return 0
        self._engine.runtime.reorder(np.zeros(batch, np.int32), prefix.cache)
        return min(len(prefix.tokens), max(map(len, self._rows)) - 1)

    def _run(
        self, calls: Any, inputs: Mapping[str, Any], count: int, all_logits: bool = False
    ) -> Iterator[tuple[Call, Result]]:
        for call in calls:
            self._enter()
            try:
                result = self._engine.runtime.run(call.shape(count, all_logits), call.inputs() | inputs)
            except BaseException:
                self._engine.holder = None
                raise
            yield call, result

    def _batch(self, rows: int) -> int:
        return fit(self._engine.batch_sizes, rows)

    def _enter(self, *, fresh: bool = False) -> None:
        engine = self._engine
        holder = engine.holder() if engine.holder is not None else None
        if holder is self:
            return
        if holder is not None:
            holder._kept = engine.runtime.keep()
        engine.holder = weakref.ref(self)
        if fresh:
            return
        if self._kept is None:
            raise InputError(
                "the keys and values of this answer are lost, as it was interrupted or another call went on from "
                "them; begin again with the whole prompt"
            )
        engine.runtime.reorder(np.arange(len(self.start_b), dtype=np.int32), self._kept)
        self._kept = None
