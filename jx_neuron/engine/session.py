"""Rows of tokens in a model's cache: put there, continued, reordered, and padded to a compiled batch within."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import numpy as np

from jx_neuron.engine import prompts
from jx_neuron.engine.chunks import Call, Rows, continued_calls, prefill_calls
from jx_neuron.engine.draw import Draw, idle
from jx_neuron.engine.rotations import Rotations
from jx_neuron.errors import InputError, NonFiniteError
from jx_neuron.runtime import Result, Runtime
from jx_neuron.step.buckets import Buckets, fit
from jx_neuron.step.shape import Shape

LOST = object()  # in place of a cache that cannot be restored


@dataclass(frozen=True)
class Prefix:
    """Tokens whose keys and values are kept aside, in a cache of the runtime's."""

    tokens: np.ndarray
    cache: Any

    def begins(self, rows: Rows, rotations: Rotations | None) -> bool:
        """Whether every row starts with it, keys rotated alike."""
        length = len(self.tokens)
        return all(
            np.array_equal(row[:length], self.tokens) and (rotations is None or rotations.same(length, len(row)))
            for row in rows
        )


@dataclass
class Engine:
    """A model's runtime and what its programs take. Its cache is that of one session at a time, the `holder`.

    Threads share it: who uses the runtime holds `lock`.

    batch_sizes:      rows that programs were made for, ascending; fewer are padded.
    prompt_batch:     rows of programs that take prompts, where they are others.
    rotations:        how RoPE depends on a prompt's length, None where it does not.
    first_not_finite: names the first tensor that holds a NaN or an infinity, None where none does.
    """

    runtime: Runtime
    buckets: Buckets
    batch_sizes: Sequence[int]
    prompt_batch: int | None
    vocab_size: int
    rotations: Rotations | None = None
    first_not_finite: Callable[[], str | None] = lambda: None
    prefix: Prefix | None = None
    holder: "weakref.ref[Session] | None" = None
    lock: RLock = field(default_factory=RLock)

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
        with self.lock:
            self.prefix = None
            Session(self, [tokens]).logits()
            self.prefix, self.holder = Prefix(tokens, self.runtime.keep()), None


class Session:
    """`rows` of tokens, each `copies` times over, in a model's cache.

    start_b [batch] is where each row's next token will stand; its first `count` rows are those asked for.

    Sessions may take turns, in one thread or in several: the cache of one is set aside when another goes on. InputError
    is raised where one would go on whose cache is lost, as it was interrupted.
    """

    def __init__(self, engine: Engine, rows: Rows, copies: int = 1):
        self._engine, self._rows, self.copies, self.count = engine, rows, copies, len(rows) * copies
        self._kept: Any = LOST
        self.start_b = np.zeros(self._batch(self.count), np.int32)

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
        engine = self._engine
        batch = engine.prompt_batch or self._batch(len(self._rows))
        rows = [*self._rows, *[self._rows[0][:1]] * (batch - len(self._rows))]
        inputs = idle(batch, engine.greedy_candidates) if draw is None else draw.inputs(batch)
        count = engine.greedy_candidates if draw is None else draw.candidates
        with engine.lock:
            self._enter(fresh=True)
            held, sizes = self._held(batch), None
            if held:
                sizes = [size for size in engine.chunk_sizes if size in engine.buckets.context]
            calls = list(prefill_calls(rows, engine.buckets, held, sizes))
            if not held:
                shapes = [call.shape(count, all_logits) for call in calls]
                following = Shape(self._batch(self.count), 1, engine.buckets.slots(max(map(len, rows)) + 1), count)
                engine.runtime.compile([*shapes, following] if goes_on else shapes)
            ran = self._run(calls, inputs, count, all_logits, read=all_logits)
            first = next(ran)
        yield first
        yield from ran
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
        prompts.check_end(int(self.start_b[: self.count].max()) + length, engine.buckets.capacity)
        tokens_bt = np.pad(tokens_nt, ((0, len(self.start_b) - self.count), (0, 0)))
        calls = continued_calls(tokens_bt, self.start_b, engine.buckets, engine.chunk_sizes)
        inputs = idle(len(self.start_b), engine.greedy_candidates)
        ran = self._run(calls, inputs, engine.greedy_candidates, all_logits, read=True)
        every = self._gather(ran, self.start_b, length)
        self.start_b = self.start_b + np.int32(length)
        return every if all_logits else every[:, -1:]

    def logits(self, all_logits: bool = False) -> np.ndarray:
        """Fills the cache; logits float32 [count, v] of each row's last token, or of all, [count, t, v]."""
        if not all_logits:
            with self.lock:
                logits_nv = self.first(self.prefill())
            self.require_finite(np.isfinite(logits_nv).all(axis=-1))
            return logits_nv
        first_b = np.zeros_like(self.start_b)
        return self._gather(self.prefill_chunks(all_logits=True), first_b, max(map(len, self._rows)))

    @property
    def lock(self) -> RLock:
        """To be held from a call of `prefill` or `decode` until its logits are read, where other threads go on."""
        return self._engine.lock

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
        self.require_finite(np.isfinite(every).all(axis=(1, 2)))
        return every

    def require_finite(self, finite_n: Any) -> None:
        """Raises NonFiniteError that names the first row that is not, and why; its cache, as bad, is dropped."""
        if finite_n.all():
            return
        engine = self._engine
        with engine.lock:
            if engine.holder is not None and engine.holder() is self:
                engine.runtime.clear()
                engine.holder = None
        self._kept = LOST
        tensor = engine.first_not_finite()
        why = (
            f"so does tensor {tensor}: load a sound checkpoint"
            if tensor
            else "no tensor of the model does: a sum grew beyond what the dtype holds. "
            "Make the model with amp='bf16' or 'f32'"
        )
        raise NonFiniteError(
            f"the logits of row {int(np.argmin(finite_n))} hold a number that is not finite (NaN or infinity), "
            f"and {why}"
        )

    def reorder(self, index_n: np.ndarray) -> None:
        """Row i goes on from what row `index_n[i]` held."""
        rest = np.arange(len(index_n), len(self.start_b))
        self._take(np.concatenate([index_n, rest]))

    def crop(self, tokens: int) -> None:
        """Forgets each row's last `tokens` tokens."""
        self.start_b = np.maximum(self.start_b - tokens, 0)

    def seek(self, start_n: np.ndarray) -> None:
        """Has each row's next token stand at `start_n` [count]. Raises InputError where that leaves a gap."""
        if len(start_n) != self.count or (start_n > self.start_b[: self.count]).any():
            raise InputError(
                f"{len(start_n)} rows cannot go on at positions {start_n.tolist()}: the last call left {self.count} "
                f"rows of {self.start_b[: self.count].tolist()} tokens; go on with as many, at most at those positions"
            )
        self.start_b = np.pad(start_n, (0, len(self.start_b) - self.count)).astype(np.int32)

    def _take(self, index_b: np.ndarray) -> None:
        with self.lock:
            self._enter()
            self._engine.runtime.reorder(index_b.astype(np.int32))
        self.start_b = self.start_b[index_b]

    def _held(self, batch: int) -> int:
        prefix = self._engine.prefix
        if prefix is None or not prefix.begins(self._rows, self._engine.rotations):
            longest = max(map(len, self._rows))
            self._engine.runtime.reset(self._engine.buckets.slots(min(longest + 1, self._engine.buckets.capacity)))
            return 0
        self._engine.runtime.reorder(np.zeros(batch, np.int32), prefix.cache)
        return min(len(prefix.tokens), max(map(len, self._rows)) - 1)

    def _run(
        self, calls: Any, inputs: Mapping[str, Any], count: int, all_logits: bool = False, *, read: bool = False
    ) -> Iterator[tuple[Call, Result]]:
        """Each call's result; with `read`, its logits are on the host."""
        engine = self._engine
        for call in calls:
            with engine.lock:
                self._enter()
                try:
                    result = engine.runtime.run(call.shape(count, all_logits), call.inputs() | inputs)
                    if read:
                        result = Result(result.token_b1, np.asarray(result.logits_bv))
                except BaseException:
                    engine.holder = None
                    raise
            yield call, result

    def _batch(self, rows: int) -> int:
        return fit(self._engine.batch_sizes, rows)

    def _enter(self, *, fresh: bool = False) -> None:
        """Makes the runtime's cache this session's own; `fresh`, whatever it holds. The lock is held."""
        engine = self._engine
        holder = engine.holder() if engine.holder is not None else None
        if holder is self:
            return
        if not fresh and self._kept is LOST:
            raise InputError(
                "the keys and values of this answer are lost, as it was interrupted; begin again with the whole prompt"
            )
        if holder is not None:
            holder._kept = engine.runtime.keep()
        if not fresh:
            engine.runtime.restore(self._kept)
        engine.holder, self._kept = weakref.ref(self), LOST
