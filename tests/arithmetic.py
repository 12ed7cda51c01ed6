"""A runtime made of arithmetic, strict about what it is given: a token follows from all tokens before it, and a
uniform number, by a sum."""

from collections.abc import Iterable, Sequence

import numpy as np

from jx_neuron.engine.draw import Draw
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput

VOCAB = 97
NOTHING = -7  # where nothing was written
SPREAD = 5  # of how many tokens a draw may take one


def likely(tokens: Sequence[int]) -> list[int]:
    """The tokens that may follow, all as likely, ascending."""
    first = sum((i + 1) * (token + 3) for i, token in enumerate(tokens)) % VOCAB
    return sorted((first + i) % VOCAB for i in range(SPREAD))


def base(tokens: Sequence[int]) -> int:
    """The first token that may follow."""
    return likely(tokens)[0]


def following(tokens: Sequence[int], draw: Draw, index: int) -> int:
    """The token that follows `tokens`, where `index` tokens of the answer are among them."""
    return likely(tokens)[int(draw.uniform(index) * SPREAD) if draw.top_k > 1 else 0]


class Arithmetic:
    """The state of a slot is the tokens that were put there; of the last `window` of these where it is given.

    With a window of 0, a row that verifies a draft may begin again where the last one did in its slot.
    """

    def __init__(
        self, slots: int, positions: int, programs: frozenset[ProgramKey] | None = None, window: int | None = None
    ):
        self.programs, self._most, self._window = programs, (slots, positions), window
        self.table = np.full((0, positions), NOTHING)
        self.last, self.end, self.before = np.full(0, NOTHING), np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.runs: list[StepInput] = []
        self.ready: set[ProgramKey] = set()
        if programs is not None:
            self._grow(slots)

    def load(self, programs: Iterable[ProgramKey]) -> None:
        for key in programs:
            self.ready.add(key)
            assert self.programs is None or key in self.programs, key.name

    def loaded(self, program: ProgramKey) -> bool:
        return program in self.ready

    def run(self, step: StepInput) -> StepOutput:
        key, arrays = step.key, step.arrays
        self.load([key])
        self.runs.append(step)
        layouts = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        assert layouts == {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in key.inputs().items()}
        slot_b = arrays.get("slot_b", np.arange(key.rows))
        assert len(set(slot_b.tolist())) == key.rows, "two rows name one slot"
        self._grow(int(slot_b.max()) + 1)
        token_bt = np.zeros(key.drawn, np.int32)
        logits = np.full((key.rows, key.tokens, VOCAB), -1e9, np.float32)
        for row, slot in enumerate(slot_b.tolist()):
            start, length = int(arrays["start_b"][row]), int(arrays["length_b"][row])
            count = min(length, key.tokens)
            if not count:
                continue
            if start < 0:
                start = -1 - start
                assert (key.kind, self._window, start) == ("verify", 0, self.before[slot])
                self.end[slot] = start
            if key.kind == "verify":
                self.before[slot] = start
            assert start + count <= key.positions
            assert start == 0 or key.tokens == 1 or key.tokens < key.positions, "a whole prompt begins at 0"
            assert key.positions <= self._most[1]
            tokens = arrays["tokens_bt"][row, :count].copy()
            if key.in_place and tokens[0] == -1:
                tokens[0] = self.last[slot]
            assert (tokens >= 0).all()
            if start and self._window is not None:
                lost = max(0, self.end[slot] - self._window)  # the first positions, from which others took their place
                needed = max(0, start - max(self._window - 1, 0)) if self._window else start
                assert lost <= needed, f"slot {slot} has lost what position {start} needs"
            self.end[slot] = max(self.end[slot] if start else 0, start + count)
            self.table[slot, start : start + count] = tokens
            for t in range(count):
                before = self.table[slot, : start + t + 1].tolist()
                assert NOTHING not in before, f"slot {slot} has a gap"
                tokens_k = likely(before)
                logits[row, t, tokens_k] = 10
                draws = "temperature_b" in arrays and arrays["top_k_b"][row] > 1
                at = t if key.kind == "verify" else 0
                uniform_t = arrays.get("uniform_bt", arrays.get("uniform_b", np.zeros(key.drawn))).reshape(key.drawn)
                token_bt[row, at] = tokens_k[int(uniform_t[row, at] * SPREAD) if draws else 0]
            self.last[slot] = token_bt[row, at]
        if key.gives_every:
            return StepOutput(token_bt, logits)
        last_b = np.clip(arrays["length_b"], 1, key.tokens) - 1
        return StepOutput(token_bt, logits[np.arange(key.rows), last_b])

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        self._grow(int(target_n.max()) + 1)
        self.table[target_n], self.last[target_n] = self.table[source_n], self.last[source_n]
        self.end[target_n], self.before[target_n] = self.end[source_n], self.before[source_n]

    def clear(self, slot_n: np.ndarray) -> None:
        self.table[slot_n] = NOTHING

    def reset(self, slots: int, positions: int) -> None:
        assert slots <= self._most[0]
        assert positions <= self._most[1]
        self.table, self.last, self.end, self.before = self.table[:0], self.last[:0], self.end[:0], self.before[:0]
        if self.programs is not None:
            self._grow(self._most[0])

    def _grow(self, slots: int) -> None:
        more = max(0, slots - len(self.table))
        self.table = np.vstack([self.table, np.full((more, self.table.shape[1]), NOTHING)])
        self.last = np.append(self.last, np.full(more, NOTHING))
        self.end, self.before = (np.append(of, np.zeros(more, np.int64)) for of in (self.end, self.before))
