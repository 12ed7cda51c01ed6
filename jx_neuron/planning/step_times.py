"""How long a server's steps take: measured on this machine, or estimated for an instance."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.errors import InputError
from jx_neuron.planning.speed import Speed
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput

if TYPE_CHECKING:
    from jx_neuron.engine.engine import Engine


class StepTimes:
    """Seconds of a server's steps, and the settings of the server.

    turn:    seconds of the host for each turn.
    token:   seconds of the host for each token.
    request: seconds from a client to the engine.
    """

    settings: Settings
    turn = token = request = 0.0

    @property
    def programs(self) -> frozenset[ProgramKey] | None:
        """The server's programs; None where programs are compiled on demand."""
        raise NotImplementedError

    def step(self, key: ProgramKey) -> float:
        """Seconds of a step."""
        raise NotImplementedError

    def copy(self, slots: int) -> float:
        """Seconds in which this number of slots is copied to others."""
        raise NotImplementedError

    def require_room(self, tokens: int) -> None:
        """Raises InputError where a request of this number of tokens is longer than the model's sequences."""
        if tokens > self.settings.buckets.capacity:
            raise InputError(
                f"a request has {tokens} tokens, prompt and answer together, and the model "
                f"{self.settings.buckets.capacity} positions; give more n_positions, or a load of shorter requests"
            )


class Measured(StepTimes):
    """The step times of a model on this machine, which nothing else may use meanwhile.

    A program is timed when a simulation first needs it, `runs` times; a step takes one of these times, at random.

    Attributes:
        seconds: the times of each program that was needed; those put there are taken as they are.
    """

    def __init__(self, model: Any, runs: int = 5, seed: int = 0):
        self.settings, self._runs, self._random = model.settings, runs, np.random.default_rng(seed)
        self._engine: Engine = model.engine
        if not self._engine.reserved:
            self._engine.reserve(1)  # which gives the state table its largest size
        self.seconds: dict[ProgramKey, list[float]] = {}

    @property
    def programs(self) -> frozenset[ProgramKey] | None:
        return self._engine.runtime.programs

    def step(self, key: ProgramKey) -> float:
        if key not in self.seconds:
            self.seconds[key] = self._time(key)
        return float(self._random.choice(self.seconds[key]))

    def copy(self, slots: int) -> float:
        return slots * self._copy

    @cached_property
    def _copy(self) -> float:
        """Seconds of a copy: by how much a decode step comes later behind one."""
        candidates = self.settings.vocab_size if self.programs is None else self.settings.candidates
        key = ProgramKey("decode", self.settings.batch_sizes[0], 1, self.settings.buckets.tokens[0], candidates)
        one_n = np.zeros(1, np.int32)
        behind = self._time(key, lambda: self._engine.runtime.copy(one_n, one_n + self.settings.slots - 1))
        return max(0.0, float(np.median(behind) - np.median(self._time(key))))

    def _time(self, key: ProgramKey, before: Callable[[], None] = lambda: None) -> list[float]:
        """Seconds of runs of a program, and of what comes before each. The first run is left out."""
        runtime, step, ends = self._engine.runtime, _full(key), []
        with self._engine.lock:
            runtime.load([key])
            for _ in range(2 + self._runs):
                ends.append(time.perf_counter())
                before()
                np.asarray(runtime.run(step).token_b1)
            self._engine.scheduler.forget()
        return np.diff(ends)[1:].tolist()


@dataclass(frozen=True, eq=False)
class Estimated(StepTimes):
    """The step times of a model on an instance, as `jx_neuron.planning.speed` predicts them.

    settings: those of the server.
    speed:    of the model at the degree of the settings.
    turn, token, request: seconds of the host, as of `StepTimes`.
    """

    settings: Settings
    speed: Speed
    turn: float = 0.0
    token: float = 0.0
    request: float = 0.0

    @cached_property
    def programs(self) -> frozenset[ProgramKey]:
        return frozenset(self.settings.programs)

    def step(self, key: ProgramKey) -> float:
        return self._seconds(key)

    @cached_property
    def _seconds(self) -> Callable[[ProgramKey], float]:
        def seconds(key: ProgramKey) -> float:
            if key.kind == "decode":
                return self.speed.per_token(key.rows, key.positions)
            return self.speed.to_first_token(key.rows, key.tokens, key.positions)

        return cache(seconds)

    def copy(self, slots: int) -> float:
        """Reads and writes them at the rate of the device's memory."""
        speed = self.speed
        size = speed.outline.cache_bytes(speed.tp_degree, slots, self.settings.buckets.capacity, speed.itemsize)
        return 2 * size / speed.instance.bandwidth_per_core


def _full(key: ProgramKey) -> StepInput:
    """A step whose rows reach the program's last position, greedily."""
    arrays = {name: np.ones(shape, dtype) for name, (shape, dtype) in key.inputs().items()}
    arrays["start_b"][:] = key.positions - key.tokens
    arrays["length_b"][:] = key.tokens
    if "slot_b" in arrays:
        arrays["slot_b"][:] = range(key.rows)
    for name in {"uniform_b", "uniform_bt"} & arrays.keys():
        arrays[name] /= 2
    return StepInput(key, arrays)
