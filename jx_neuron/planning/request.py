"""Whether a request fits an instance, why it does not, and the nearest request that does."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jx_neuron.errors import InputError
from jx_neuron.planning.instances import INSTANCES, Instance
from jx_neuron.planning.memory import Memory, core_memory, host_bytes
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.speed import Speed, speed
from jx_neuron.step.buckets import MOST_POSITIONS, Buckets
from jx_neuron.util.pages import gib

FIRST_RELEASE_DEGREES = (1, 2, 8, 32)
GRAIN = 128  # positions: the step in which contexts are tried


@dataclass(frozen=True)
class Request:
    """A model and the batch, buckets and dtype to run it with.

    itemsize: bytes of a weight, and of a number of the KV cache.
    strict:   the three rules of the first release of transformers-neuronx: heads divisible by the degree; weights and
              cache smaller than a core's memory times the degree; degrees of 1, 2, 8 and 32. So nothing is padded.
    """

    outline: Outline
    batch_size: int
    buckets: Buckets
    itemsize: int
    strict: bool = False

    def memory(self, instance: Instance, tp_degree: int, activations: int | None = None) -> Memory:
        """Memory of one core."""
        return core_memory(self.outline, instance, tp_degree, self.batch_size, self.buckets, self.itemsize, activations)

    def refusal(self, instance: Instance, tp_degree: int) -> str | None:
        """Why the request cannot run on `tp_degree` cores of `instance`; None where it can."""
        if tp_degree not in instance.degrees:
            legal = _list(instance.degrees)
            return f"tp_degree={tp_degree} is not a degree that the runtime has on {instance.name}, which are {legal}"
        memory, room = self.memory(instance, tp_degree), instance.hbm_per_core
        if self.strict:
            if tp_degree not in FIRST_RELEASE_DEGREES:
                return f"tp_degree={tp_degree} is not one of the first release's, {_list(FIRST_RELEASE_DEGREES)}"
            try:
                self.outline.padding(tp_degree).require_exact()
            except InputError as error:
                return str(error)
            tensors = memory.weights + memory.cache
            if tensors >= room:
                return f"weights and cache take {gib(tensors)} of each core and it has {gib(room)}"
            return None
        if memory.total > room:
            parts = ", ".join(f"{name} {gib(size)}" for name, size in memory.items().items())
            return f"each core would need {gib(memory.total)} ({parts}) and has {gib(room)}"
        return None

    def fits(self, instance: Instance, tp_degree: int) -> bool:
        return self.refusal(instance, tp_degree) is None

    def speed(self, instance: Instance, tp_degree: int) -> Speed:
        return speed(self.outline, instance, tp_degree, self.itemsize)

    def seconds_per_token(self, instance: Instance, tp_degree: int) -> float:
        """Seconds of a decode step at the full context."""
        return self.speed(instance, tp_degree).per_token(self.batch_size, self.buckets.capacity)

    def best_degree(self, instance: Instance) -> int | None:
        """The fastest degree at which the request can run; None where there is none."""
        fitting = [degree for degree in instance.degrees if self.fits(instance, degree)]
        return min(fitting, key=lambda degree: self.seconds_per_token(instance, degree), default=None)

    def fits_host(self, instance: Instance, tp_degree: int) -> bool:
        """Whether the host's memory is enough to load the checkpoint."""
        room = instance.host_memory
        return room is None or host_bytes(self.outline, tp_degree, self.itemsize) <= room

    def cheapest(self) -> tuple[Instance, int] | None:
        """The first of `INSTANCES` that fits the request, host memory included, and the fastest degree on it."""
        for instance in INSTANCES:
            degree = self.best_degree(instance)
            if degree is not None and self.fits_host(instance, degree):
                return instance, degree
        return None

    def with_batch(self, batch_size: int) -> "Request":
        return dataclasses.replace(self, batch_size=batch_size)

    def with_positions(self, n_positions: int) -> "Request":
        """The request with another capacity. Context buckets are chosen again, and are not larger than before."""
        longest = max(self.buckets.context)
        buckets = Buckets.of(n_positions)
        context = tuple(size for size in buckets.context if size <= longest) or (min(longest, n_positions),)
        return dataclasses.replace(self, buckets=Buckets(context, buckets.tokens))

    def with_context(self, context_length_estimate: int) -> "Request":
        """The request with context buckets up to `context_length_estimate`."""
        context = sorted({min(size, context_length_estimate) for size in self.buckets.context})
        return dataclasses.replace(self, buckets=Buckets(tuple(context), self.buckets.tokens))

    def largest_batch(self, instance: Instance, tp_degree: int) -> int:
        """The most rows that fit; 0 where not even one does."""
        return most(lambda batch: self.with_batch(batch).fits(instance, tp_degree))

    def largest_positions(self, instance: Instance, tp_degree: int) -> int:
        """The longest sequence that fits and that the model has positions for, in steps of 128; 0 where none does."""
        limit = min(max(self.outline.config.trained_positions or 0, self.buckets.capacity), MOST_POSITIONS)
        steps = most(lambda n: n * GRAIN <= limit and self.with_positions(n * GRAIN).fits(instance, tp_degree))
        whole = limit if steps == limit // GRAIN and self.with_positions(limit).fits(instance, tp_degree) else 0
        return max(steps * GRAIN, whole)

    def nearest(self, instance: Instance | None, tp_degree: int | None) -> list[str]:
        """The nearest requests that can run: on `instance` where that is not None, and on others."""
        here = next(self._changed(instance, tp_degree), None) if instance else None
        requests = [here] if here else []
        elsewhere = self.cheapest()
        if elsewhere is not None and elsewhere[0] != instance:
            requests.append(f"instance {elsewhere[0].name}, tp_degree={elsewhere[1]}")
        if not requests and (change := next(self._changed(INSTANCES[-1], None), None)):
            requests.append(f"instance {INSTANCES[-1].name}, {change}")
        return requests

    def _changed(self, instance: Instance, tp_degree: int | None) -> Iterator[str]:
        """Changes with which the request runs on `instance`, the smallest first."""
        by_distance = sorted(instance.degrees, key=lambda degree: abs(degree - (tp_degree or instance.cores)))
        for degree in by_distance:
            if self.fits(instance, degree):
                yield f"tp_degree={degree}"
        largest_first = [d for d in by_distance if d == tp_degree] + sorted(instance.degrees, reverse=True)
        for degree in largest_first:
            if context := _halved(max(self.buckets.context), lambda c: self.with_context(c).fits(instance, degree)):  # noqa: B023
                yield f"tp_degree={degree}, context_length_estimate={context}"
            if batch := self.largest_batch(instance, degree):
                yield f"tp_degree={degree}, batch_size={batch}"
            if positions := self.largest_positions(instance, degree):
                yield f"tp_degree={degree}, n_positions={positions}"
            if positions := self.with_batch(1).largest_positions(instance, degree):
                yield f"tp_degree={degree}, batch_size=1, n_positions={positions}"


def most(fits: Callable[[int], bool]) -> int:
    """The largest number for which the monotonic `fits` is true; 0 if none."""
    if not fits(1):
        return 0
    above = 2
    while fits(above):
        above *= 2
    low, high = above // 2, above
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _halved(start: int, fits: Callable[[int], bool]) -> int | None:
    """The first of start/2, start/4, … down to 128 that fits."""
    size = start // 2
    while size >= GRAIN:
        if fits(size):
            return size
        size //= 2
    return None


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
