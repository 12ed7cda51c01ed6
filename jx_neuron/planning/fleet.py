"""Plans past one instance: how many replicas of a model serve a load within its latency targets, and on how many cores.

A replica is one tensor-parallel group, within an instance or an UltraServer. Requests are spread over replicas at
random, so each has a Poisson process of its own; one that knew how many requests each replica has would do better.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from jx_neuron.artifact.settings import Settings
from jx_neuron.config import KVCacheQuantizationConfig, QuantizationConfig, dtype_of
from jx_neuron.errors import InputError
from jx_neuron.models import Decoder
from jx_neuron.planning.instances import INSTANCES, ULTRASERVERS, Instance, find
from jx_neuron.planning.load import Load
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.request import Request
from jx_neuron.planning.simulation import TOKENS_PER_TURN, Simulated, simulate
from jx_neuron.planning.step_times import Estimated
from jx_neuron.step.buckets import Buckets, powers_of_two
from jx_neuron.util.arguments import integer, real

MOST_BATCH = 64
"""Slots of a replica that are tried at most; the estimates of step times are of 8 rows or fewer (docs/planning.md)."""

IDLE = 1e-6
"""Requests/s at which none waits for another."""


@dataclass(frozen=True)
class Target:
    """Seconds that 95 of 100 do not exceed.

    first_token:    of requests, from the arrival to the first token.
    between_tokens: of tokens, since the one before.
    """

    first_token: float = 1.0
    between_tokens: float = 0.1

    def __post_init__(self) -> None:
        for name, seconds in asdict(self).items():
            real(name, seconds, above=0)

    def met(self, service: Simulated) -> bool:
        """Whether a service keeps both, and refuses nothing."""
        in_time = service.first_token.p95 <= self.first_token and service.between_tokens.p95 <= self.between_tokens
        return in_time and not service.refused


@dataclass(frozen=True)
class Fleet:
    """Replicas of a model that serve a load.

    replicas:  tensor-parallel groups of `tp_degree` cores, of `batch_size` slots each.
    cores:     of all replicas.
    instances: that have this number of groups; `instance_cores` counts their cores, used or not.
    rate:      requests/s of a replica.
    service:   what a replica gives, simulated.
    """

    instance: str
    tp_degree: int
    batch_size: int
    replicas: int
    cores: int
    instances: int
    instance_cores: int
    rate: float
    service: Simulated

    def as_dict(self) -> dict[str, Any]:
        """The fleet as a dictionary, for JSON."""
        return asdict(self)


def plan_fleet(
    model: Mapping[str, Any] | Decoder,
    load: Load,
    target: Target | None = None,
    *,
    instance: str | None = None,
    tp_degree: int | None = None,
    batch_size: int | None = None,
    n_positions: int | None = None,
    context_length_estimate: int | None = None,
    amp: str = "f32",
    quant: QuantizationConfig | None = None,
    kv_cache_quant: KVCacheQuantizationConfig | None = None,
    requests: int = 150,
    seed: int = 0,
) -> list[Fleet]:
    """Plans fleets that serve a load within latency targets: of each instance type the one of the fewest cores.

    Each candidate is simulated with the package's own scheduler and estimated step times; of one instance type,
    candidates that could not have fewer cores, even if their steps were always full, are left out.

    model:       a parsed config.json, or a decoder.
    target:      by default `Target()`.
    instance:    an instance type or UltraServer, as of `find`; by default all.
    tp_degree:   cores of a replica; by default any degree of the instance.
    batch_size:  slots of a replica; by default any power of two up to 64.
    n_positions: by default as many as the load's longest request needs.
    requests:    how many a simulation has.
    seed:        of the load's random numbers.

    The other arguments are those of `plan`. Returns fleets by their cores, fewest first. Raises InputError where no
    fleet of any size is in time, and says what the fastest replica gives.
    """
    target = target or Target()
    outline = Outline.of(model, quant)
    if kv_cache_quant is not None:
        outline = outline.with_cache(kv_cache_quant.stored)
    config = outline.config
    positions = load.longest if n_positions is None else n_positions
    buckets = Buckets.within(config.max_positions, config.trained_positions, positions, context_length_estimate)
    replica = _Replicas(outline, buckets, amp, load, target, integer("requests", requests, most=10**5), seed)
    sizes = [1 << n for n in range(MOST_BATCH.bit_length())] if batch_size is None else [batch_size]
    instances = [find(instance)] if instance else [*INSTANCES, *ULTRASERVERS]
    if tp_degree is not None and not any(tp_degree in one.degrees for one in instances):
        legal = sorted({degree for one in instances for degree in one.degrees})
        raise InputError(f"tp_degree={tp_degree} is not legal; {instance or 'instances'} may have {legal}")
    fleets = []
    for one in instances:
        candidates = [
            candidate
            for degree in one.degrees
            if tp_degree in (None, degree)
            for size in sizes
            if (candidate := replica.on(one, degree, integer("batch_size", size))) is not None
        ]
        if (best := _fewest_cores(candidates)) is not None:
            fleets.append(best)
    if not fleets:
        raise InputError(replica.refusal())
    return sorted(fleets, key=lambda fleet: (fleet.cores, fleet.instance_cores))


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A replica on an instance.

    least: cores of a fleet if every step were full, and in the smallest bucket.
    fleet: of the fewest replicas that are in time, and of fewer cores than another where that is given.
    """

    least: float
    fleet: Callable[[Fleet | None], Fleet | None]


def _fewest_cores(candidates: list[_Candidate]) -> Fleet | None:
    best: Fleet | None = None
    for candidate in sorted(candidates, key=lambda candidate: candidate.least):
        if best is not None and candidate.least >= best.cores:
            break
        best = candidate.fleet(best) or best
    return best


@dataclass
class _Replicas:
    """Replicas of a model, under a load and targets.

    fastest: of the ones that are too slow even where nothing else runs, the nearest to the targets, and its name.
    """

    outline: Outline
    buckets: Buckets
    amp: str
    load: Load
    target: Target
    requests: int
    seed: int
    fastest: tuple[Simulated, str] | None = None

    def on(self, instance: Instance, tp_degree: int, batch_size: int) -> _Candidate | None:
        """A candidate; None where it does not fit the instance."""
        request = Request(self.outline, batch_size, self.buckets, dtype_of(self.amp).itemsize)
        if not (request.fits(instance, tp_degree) and request.fits_host(instance, tp_degree)):
            return None
        config = self.outline.config
        settings = Settings(
            self.outline.decoder.model_type,
            tp_degree,
            self.amp,
            powers_of_two(batch_size),
            self.buckets,
            candidates=1,
            all_logits=False,
            vocab_size=config.sizes["v"],
            rotations=config.rotations,
            window=self.outline.decoder.window,
        )
        times = Estimated(settings, request.speed(instance, tp_degree))
        least = tp_degree * self.load.rate * self._least_seconds(times)
        return _Candidate(least, lambda other: self._fleet(instance, times, other))

    def _least_seconds(self, times: Estimated) -> float:
        """Seconds of a request on a device whose every step is full."""
        prompt, answer = self.load.mean
        buckets, rows = self.buckets, times.settings.batch_sizes
        chunks = [t for t in buckets.context if t > 1] or [1]
        prefill = min(
            times.speed.to_first_token(b, t, t) / (b * t)
            for b in rows
            for t in chunks
            if b == 1 or b * t <= max(TOKENS_PER_TURN, buckets.context[-1])
        )
        decode = min(times.speed.per_token(b, buckets.tokens[0]) / b for b in rows)
        return prompt * prefill + (answer - 1) * decode

    def _fleet(self, instance: Instance, times: Estimated, other: Fleet | None) -> Fleet | None:
        """The fewest replicas that are in time; None where none are of fewer cores than another fleet."""
        settings, degree = times.settings, times.settings.tp_degree
        most = None if other is None else (other.cores - 1) // degree
        services: dict[int, Simulated] = {}

        def enough(replicas: int) -> bool:
            services[replicas] = self._at(times, self.load.rate / replicas)
            return self.target.met(services[replicas])

        if most == 0 or not self._alone(instance, times) or (most is not None and not enough(most)):
            return None
        replicas = _least(enough, max(1, math.floor(self.load.rate * self._least_seconds(times))), most)
        instances = -(-replicas // (instance.cores // degree))
        return Fleet(
            instance.name,
            degree,
            settings.slots,
            replicas,
            replicas * degree,
            instances,
            instances * instance.cores,
            self.load.rate / replicas,
            services[replicas],
        )

    def _alone(self, instance: Instance, times: Estimated) -> bool:
        """Whether a request is in time where there is no other; if not, the nearest is remembered."""
        service = self._at(times, IDLE)
        met = self.target.met(service)
        if not met and (self.fastest is None or _excess(service, self.target) < _excess(self.fastest[0], self.target)):
            self.fastest = service, f"{instance.name} at tp {times.settings.tp_degree}"
        return met

    def _at(self, times: Estimated, rate: float) -> Simulated:
        """A replica's service at a rate."""
        count = self.requests if rate > IDLE else min(self.requests, 10)
        return simulate(times, replace(self.load, rate=rate), requests=count, seed=self.seed)

    def refusal(self) -> str:
        """Why no fleet serves the load."""
        wanted = f"first token {self.target.first_token:g} s, between tokens {self.target.between_tokens:g} s"
        if self.fastest is None:
            return (
                f"no replica fits any instance asked for, at {self.buckets.capacity} positions in {self.amp}; "
                "`plan` says what each would need"
            )
        service, name = self.fastest
        return (
            f"no fleet is in time, however large ({wanted}, of 95 in 100). The nearest, {name}, takes "
            f"{service.first_token.p95:.3g} s to the first token and {service.between_tokens.p95:.3g} s between tokens "
            "when nothing else runs; allow more time"
        )


def _excess(service: Simulated, target: Target) -> float:
    """By what factor a service misses its targets."""
    return max(
        service.first_token.p95 / target.first_token,
        service.between_tokens.p95 / target.between_tokens,
    )


def _least(enough: Callable[[int], bool], low: int, high: int | None) -> int:
    """The least number from `low` on for which `enough` is true; it is for all beyond, and for `high`."""
    if high is None:
        high = low
        while not enough(high):
            low, high = high + 1, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
