"""A runtime of several processes: the leader sends each call to the others, which make the same calls in order."""

import queue
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from threading import RLock
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jx_neuron.distributed.frames import Message
from jx_neuron.distributed.group import SILENCE_SECONDS, Group
from jx_neuron.errors import InputError, JxNeuronError
from jx_neuron.runtime.base import Runtime
from jx_neuron.runtime.neuron import Logits as NeuronLogits
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput, StepOutput


class Shared:
    """A leader's runtime.

    model: what identifies the model; it has to be the same in every process.
    """

    _order = RLock()  # of all runtimes: collectives start in the same order everywhere

    def __init__(self, runtime: Runtime, group: Group, number: int, model: str):
        self._runtime, self._group, self._number = runtime, group, number
        self._steps = 0
        self._loaded: set[ProgramKey] = set()
        self._call("model", model=model)

    @property
    def programs(self) -> frozenset[ProgramKey] | None:
        return self._runtime.programs

    def loaded(self, program: ProgramKey) -> bool:
        """Whether every process has a program. Gloo gives up where one starts a collective 30 s after another."""
        return program in self._loaded and self._runtime.loaded(program)

    def load(self, programs: Iterable[ProgramKey]) -> None:
        if not (keys := [key for key in programs if not self.loaded(key)]):
            return
        number = self._group.meeting()
        self._call("load", keys=[asdict(key) for key in keys], number=number)
        try:
            self._runtime.load(keys)
        finally:
            come = self._group.meet(number)
        if error := max(message.fields["error"] for message in come):
            raise InputError(error)
        self._loaded.update(keys)

    def run(self, step: StepInput) -> StepOutput:
        with self._order:
            self.load([step.key])
            self._call("run", step.arrays, key=asdict(step.key))
            try:
                output = self._runtime.run(step)
            except JxNeuronError:  # the others raise it too
                raise
            except Exception as error:
                self._group.fail(error)
            self._steps += 1
            return output._replace(
                token_b1=Tokens(output.token_b1, self._group), logits=Logits(self, output.logits, self._steps)
            )

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        with self._order:
            self._call("copy", {"source_n": source_n, "target_n": target_n})
            self._runtime.copy(source_n, target_n)

    def clear(self, slot_n: np.ndarray) -> None:
        with self._order:
            self._call("clear", {"slot_n": slot_n})
            self._runtime.clear(slot_n)

    def reset(self, slots: int, positions: int) -> None:
        with self._order:
            self._call("reset", slots=slots, positions=positions)
            self._runtime.reset(slots, positions)

    def gather(self, logits: Any, step: int) -> np.ndarray:
        """Logits of the last step, whole."""
        with self._order:
            if step != self._steps:
                raise RuntimeError("these logits were overwritten by a later run; read them before the next one")
            number = self._group.meeting()
            self._call("gather", number=number)
            try:
                own = part(logits)
                come = self._group.meet(number)
            except Exception as error:
                self._group.fail(error)
            others = [message.arrays["part"] for message in come if message.arrays]
            return np.concatenate([own, *others], logits.axis) if others else own

    def _call(self, kind: str, arrays: Any = None, **fields: Any) -> None:
        with self._order:
            self._group.send(Message(kind, {"runtime": self._number, **fields}, arrays or {}))


class Tokens:
    """Tokens of a step, read once it has ended."""

    def __init__(self, token_b1: jax.Array, group: Group):
        self._token_b1, self._group = token_b1, group

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            return np.asarray(self._token_b1, dtype)
        except Exception as error:
            self._group.fail(error)


class Logits:
    """Logits on the devices of all processes, joined when read. The next run overwrites them."""

    def __init__(self, runtime: Shared, logits: Any, step: int):
        self._runtime, self._logits, self._step = runtime, logits, step

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._runtime.gather(self._logits, self._step), dtype)


def part(logits: jax.Array | NeuronLogits) -> np.ndarray:
    """What this process adds to logits: all of JAX's, which a collective of every process joins; of others its own."""
    if isinstance(logits, jax.Array):
        logits = _whole(NamedSharding(logits.sharding.mesh, PartitionSpec()))(logits)
    return np.asarray(logits)


@cache
def _whole(everywhere: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=everywhere)


class Follower:
    """Makes the leader's calls on the runtimes of this process."""

    def __init__(self, group: Group, runtimes: list[tuple[Runtime, str]]):
        self._group, self._runtimes = group, runtimes
        self._loader = ThreadPoolExecutor(1, "jx-neuron-loader")
        self._logits: dict[int, Any] = {}

    def run(self) -> None:
        """Returns once the leader has ended."""
        error: JxNeuronError | None = None
        while (message := self._next(error)).kind != "close":
            try:
                self._do(message)
                error = None
            except JxNeuronError as raised:
                error = raised
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _next(self, error: JxNeuronError | None) -> Message:
        """The next call; after an error that of a leader which has it too. Raises the error for any other."""
        if error is None:
            return self._group.received.get()
        with suppress(queue.Empty):
            message = self._group.received.get(timeout=SILENCE_SECONDS / 4)
            if message.kind in ("reset", "close"):
                return message
        raise error

    def _do(self, message: Message) -> None:
        fields, arrays = dict(message.fields), message.arrays
        number = fields.pop("runtime")
        runtime, model = self._runtimes[number]
        match message.kind:
            case "model":
                if fields["model"] != model:
                    raise InputError(
                        f"process 0 has another model ({fields['model']}) than process {self._group.hosts.rank} "
                        f"({model}); start the same command, with the same files, on every host"
                    )
            case "load":
                keys = [key_of(key) for key in fields["keys"]]
                self._loader.submit(self._load, runtime, keys, fields["number"])
            case "run":
                self._logits[number] = runtime.run(StepInput(key_of(fields["key"]), arrays)).logits
            case "gather":
                logits = self._logits[number]
                own = part(logits)
                is_whole = isinstance(logits, jax.Array) or logits.axis is None
                self._group.come(fields["number"], part=None if is_whole else own)
            case "copy":
                runtime.copy(arrays["source_n"], arrays["target_n"])
            case "clear":
                runtime.clear(arrays["slot_n"])
            case "reset":
                runtime.reset(fields["slots"], fields["positions"])
            case kind:
                raise InputError(f"process 0 asks for {kind!r}, which this version does not know")

    def _load(self, runtime: Runtime, keys: Iterable[ProgramKey], number: int) -> None:
        try:
            runtime.load(keys)
        except Exception as error:
            self._group.come(number, f"process {self._group.hosts.rank} cannot load a program: {error}")
        else:
            self._group.come(number)


def key_of(fields: Mapping[str, Any]) -> ProgramKey:
    """The key of which `asdict` gave the fields; JSON has lists in place of tuples."""
    return ProgramKey(**{**fields, "taps": tuple(fields["taps"])})
