"""Prefill in buckets and chunks, then decode token by token, with the next step under way while one is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.lowering.buckets import Buckets, fit
from jx_neuron.lowering.shape import Shape
from jx_neuron.runtime import Result, Runtime

Rows = Sequence[np.ndarray]


@dataclass(frozen=True)
class Draw:
    """How each row's tokens are chosen: temperature, top_k and top_p are [b] arrays, `seeds` one integer a row.

    Draw i of a row is number i of a Philox stream keyed by its seed (Salmon et al., 2011), whatever the batch.
    """

    temperature_b: np.ndarray
    top_k_b: np.ndarray
    top_p_b: np.ndarray
    seeds: Sequence[Sequence[int]]
    candidates: int
    streams: list[np.random.Generator] = field(init=False, repr=False)

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        top_k: Any,
        top_p: Any,
        temperature: Any,
        seed: int | None,
        global_top_k: int,
        vocab_size: int,
        compiled: int | None,
    ) -> "Draw":
        """One value for all rows, or one a row, of each; a temperature of 0 is greedy, a top_k of 0 all tokens.

        `compiled` is the runtime's number of candidates, None where it has programs for any.

        Raises InputError for values that make no distribution, or that the compiled programs cannot draw from.
        """
        temperature_b = _per_row("temperature", temperature, batch, np.float32, lambda x: x >= 0, "0 or more")
        top_k_b = _per_row("top_k", top_k, batch, np.int32, lambda x: x >= 0, "0 (all) or more")
        top_p_b = _per_row("top_p", top_p, batch, np.float32, lambda x: (x > 0) & (x <= 1), "above 0 and at most 1")
        top_k_b = np.where(temperature_b == 0, np.int32(1), top_k_b)
        temperature_b = np.where(temperature_b == 0, np.float32(1), temperature_b)
        count = _candidates(top_k_b, vocab_size, global_top_k, compiled)
        entropy = np.random.SeedSequence().entropy if seed is None else seed
        if not isinstance(entropy, int) or entropy < 0:
            raise InputError(f"seed={seed!r} is not legal; it takes an integer that is not negative")
        seeds = [(entropy, row) for row in range(batch)]
        return cls(temperature_b, top_k_b, top_p_b, seeds, count)

    @classmethod
    def greedy(cls, batch: int, compiled: int | None) -> "Draw":
        """The most likely token of each row."""
        ones = np.ones(batch, np.float32)
        return cls(ones, ones.astype(np.int32), ones, [(0, row) for row in range(batch)], compiled or 1)

    def __post_init__(self) -> None:
        streams = [np.random.Generator(np.random.Philox(np.random.SeedSequence(list(s)))) for s in self.seeds]
        object.__setattr__(self, "streams", streams)

    def inputs(self) -> dict[str, np.ndarray]:
        """The next draw's inputs to the program."""
        if self.candidates == 1:
            return {}
        uniform_b = np.array([s.random(dtype=np.float32) for s in self.streams])
        return dict(temperature_b=self.temperature_b, top_k_b=self.top_k_b, top_p_b=self.top_p_b, uniform_b=uniform_b)


@dataclass(frozen=True)
class Call:
    """One prefill program's inputs: tokens [b, t], where each row starts, and its tokens from there on."""

    tokens_bt: np.ndarray
    start_b: np.ndarray
    length_b: np.ndarray
    slots: int

    def inputs(self) -> dict[str, np.ndarray]:
        """What the program takes."""
        return {"tokens_bt": self.tokens_bt, "start_b": self.start_b, "length_b": self.length_b}


def prefill_calls(rows: Rows, buckets: Buckets) -> Iterator[Call]:
    """The calls that put whole prompts into an empty cache. After the last, logits are each row's last token's.

    Every chunk ends within the cache, so one that would not starts earlier and computes some tokens again; a row that
    ended in an earlier chunk computes its last token again.
    """
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    t = fit(buckets.context, longest)
    for first in range(0, longest, t):
        alone = longest <= t and t > 1
        slots = t if alone else buckets.slots(min(first + t, buckets.capacity))
        start_b = np.minimum(np.where(lengths > first, first, lengths - 1), slots - t).astype(np.int32)
        tokens_bt = np.zeros((len(rows), t), np.int32)
        for row, start, into in zip(rows, start_b, tokens_bt, strict=True):
            part = row[start : start + t]
            into[: len(part)] = part
        yield Call(tokens_bt, start_b, (lengths - start_b).astype(np.int32), slots)


def prefill(runtime: Runtime, rows: Rows, buckets: Buckets, draw: Draw) -> Result:
    """Fills the cache with the prompts and gives the first token and the last logits of each row."""
    runtime.reset()
    sampling = draw.inputs()
    for call in prefill_calls(rows, buckets):
        shape = Shape(len(rows), call.tokens_bt.shape[1], call.slots, draw.candidates)
        result = runtime.run(shape, call.inputs() | sampling)
    return result


def decode(runtime: Runtime, token_b1: object, start_b: np.ndarray, buckets: Buckets, draw: Draw) -> Result:
    """One token more of each row, whose tokens so far stand at positions before `start_b`."""
    shape = Shape(len(start_b), 1, buckets.slots(int(start_b.max()) + 1), draw.candidates)
    inputs = dict(tokens_bt=token_b1, start_b=start_b, length_b=np.ones_like(start_b))
    return runtime.run(shape, inputs | draw.inputs())


def logits(
    runtime: Runtime, rows: Rows, start_b: np.ndarray, buckets: Buckets, all_logits: bool, *, fresh: bool
) -> np.ndarray:
    """Logits float32 [b, v] after each row's last token, or [b, t, v] of every token, t the longest row's length.

    The rows' first tokens stand at `start_b`; `fresh` empties the cache first, and then they must start at 0.
    """
    if fresh:
        runtime.reset()
    calls = prefill_calls(rows, buckets) if fresh else continued_calls(rows, start_b, buckets)
    draw = Draw.greedy(len(rows), runtime.candidates)
    lengths = np.array([len(row) for row in rows])
    parts = []
    for call in calls:
        t = call.tokens_bt.shape[1]
        shape = Shape(len(rows), t, call.slots, draw.candidates, all_logits and t > 1)
        result = np.asarray(runtime.run(shape, call.inputs() | draw.inputs()).logits_bv)
        parts.append((call.start_b - start_b, result if shape.all_logits else result[:, None]))
    if not all_logits:
        return parts[-1][1][:, 0]
    every = np.zeros((len(rows), int(lengths.max()), parts[0][1].shape[-1]), np.float32)
    for first_b, result in parts:
        for into, logits_tv, first, length in zip(every, result, first_b, lengths, strict=True):
            count = min(length - first, len(logits_tv))
            into[first : first + count] = logits_tv[:count]
    return every


def continued_calls(rows: Rows, start_b: np.ndarray, buckets: Buckets) -> Iterator[Call]:
    """The calls that put tokens behind what the cache already holds: all rows from `start_b` on, with one length."""
    length = len(rows[0])
    if any(len(row) != length for row in rows):
        raise InputError("rows that go on from a cache must have one length; padding was for the prompt")
    if int(start_b.max()) + length > buckets.capacity or int(start_b.min()) < 0:
        raise InputError(
            f"cache_ids from {int(start_b.max())} on with {length} tokens do not fit n_positions={buckets.capacity}"
        )
    done = 0
    while done < length:
        at_b = (start_b + done).astype(np.int32)
        fitting = [t for t in (1, *buckets.context) if int(at_b.max()) + t <= buckets.capacity]
        t = fit(fitting, length - done)
        tokens_bt = np.zeros((len(rows), t), np.int32)
        part = np.stack([row[done : done + t] for row in rows])
        tokens_bt[:, : part.shape[1]] = part
        yield Call(tokens_bt, at_b, np.full(len(rows), length - done, np.int32), buckets.slots(int(at_b.max()) + t))
        done += t


def stream(runtime: Runtime, rows: Rows, buckets: Buckets, draw: Draw, steps: int) -> Iterator[np.ndarray]:
    """The next `steps` tokens of each row, [b] at a time. Step i + 1 is under way before step i is read."""
    if steps < 1:
        return
    result = prefill(runtime, rows, buckets, draw)
    start_b = np.array([len(row) for row in rows], np.int32)
    for _ in range(1, steps):
        following = decode(runtime, result.token_b1, start_b, buckets, draw)
        yield np.asarray(result.token_b1)[:, 0]
        start_b, result = start_b + 1, following
    yield np.asarray(result.token_b1)[:, 0]


def answer(
    runtime: Runtime,
    rows: Rows,
    buckets: Buckets,
    draw: Draw,
    steps: int,
    eos: Sequence[int],
    pad: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`stream`, until every row has given one of `eos`: pairs of tokens [b] and whether each row has ended [b].

    A row that has ended gives `pad`.
    """
    ended_b = np.zeros(len(rows), bool)
    for token_b in stream(runtime, rows, buckets, draw, steps):
        answer_b = np.where(ended_b, pad, token_b)
        ended_b = ended_b | np.isin(token_b, eos)
        yield answer_b, ended_b
        if ended_b.all():
            return


def _per_row(name: str, value: Any, batch: int, dtype: Any, legal: Callable[[Any], Any], words: str) -> np.ndarray:
    array = np.asarray(value, dtype)
    if array.shape not in ((), (batch,)) or not np.all(legal(array)):
        raise InputError(f"{name}={value!r} is not legal; it takes a number {words}, or {batch} of them, one a row")
    return np.broadcast_to(array, (batch,))


def _candidates(top_k_b: np.ndarray, vocab_size: int, global_top_k: int, compiled: int | None) -> int:
    most = vocab_size if (top_k_b == 0).any() else min(int(top_k_b.max()), vocab_size)
    if compiled is not None:
        if most > compiled:
            asked = "0 (all)" if (top_k_b == 0).any() else int(top_k_b.max())
            raise InputError(
                f"top_k={asked} needs more candidates than the {compiled} that the programs were compiled with; "
                f"ask for at most {compiled}, or compile with a larger GenerationConfig(global_top_k=…)"
            )
        return compiled
    if most == 1:
        return 1
    return min(vocab_size, global_top_k if most <= global_top_k else 1 << (most - 1).bit_length())
