"""A plan: which instance and degree hold a model, item by item, and how fast it will be."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jx_neuron.config import KVCacheQuantizationConfig, QuantizationConfig, dtype_of
from jx_neuron.errors import InputError
from jx_neuron.models import Decoder
from jx_neuron.planning.instances import INSTANCES, Instance, find
from jx_neuron.planning.memory import Memory, host_bytes, lowered_activation_bytes
from jx_neuron.planning.outline import Outline
from jx_neuron.planning.request import Request
from jx_neuron.step.buckets import MOST_ROWS, Buckets
from jx_neuron.util.arguments import integer
from jx_neuron.util.pages import count_text, gib

Lengths = int | Sequence[int]
LISTED_ROWS = 256  # the largest batch that `rates` lists


@dataclass(frozen=True)
class Degree:
    """A tensor-parallel degree of the instance: why it is refused, or None; memory of one core; time per token."""

    tp_degree: int
    refusal: str | None
    memory: Memory
    seconds_per_token: float


@dataclass(frozen=True)
class Rate:
    """Predicted speed of one batch size at the full context."""

    batch_size: int
    seconds_per_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """The result of `plan`, in bytes and seconds. Times are estimates; docs/planning.md states their error.

    cache_dtype: the dtype that keys and values are stored in; None for that of `amp`.
    """

    model_type: str
    parameters: int
    active_parameters: int
    instance: str
    tp_degree: int
    batch_size: int
    n_positions: int
    context_length: int
    amp: str
    cache_dtype: str | None
    memory: Memory
    memory_per_core: int
    activations_lowered: bool
    tight: bool
    host_bytes: int
    host_memory: int | None
    padding: str | None
    degrees: tuple[Degree, ...]
    seconds_per_token: float
    seconds_to_first_token: float
    rates: tuple[Rate, ...]
    largest_batch: int
    largest_n_positions: int
    notes: tuple[str, ...]

    @property
    def size(self) -> str:
        """The parameters, and how many are active for a token, such as "30.5 B parameters, 3.34 B active"."""
        active = f", {count_text(self.active_parameters)} active" if self.active_parameters < self.parameters else ""
        return f"{count_text(self.parameters)} parameters{active}"

    def as_dict(self) -> dict[str, Any]:
        """The plan as a dictionary, for JSON."""
        fields = asdict(self)
        fields["memory"] = self.memory.as_dict()
        for listed, degree in zip(fields["degrees"], self.degrees, strict=True):
            listed["memory"] = degree.memory.as_dict()
        return fields


def plan(
    model: Mapping[str, Any] | Decoder,
    instance: str | None = None,
    tp_degree: int | None = None,
    *,
    batch_size: int = 1,
    n_positions: Lengths | None = None,
    context_length_estimate: Lengths | None = None,
    amp: str = "f32",
    quant: QuantizationConfig | None = None,
    kv_cache_quant: KVCacheQuantizationConfig | None = None,
    strict: bool = False,
    lower: bool = False,
) -> Plan:
    """Plans where a model runs, and how fast.

    >>> from jx_neuron.models.known import config_of
    >>> result = plan(config_of("facebook/opt-13b"), amp="f16")
    >>> result.instance, result.tp_degree
    ('trn1.2xlarge', 2)

    model:                   a parsed config.json, or a decoder.
    instance:                an instance type, or a family ("trn1": its largest). By default the first that holds the
                             request, by number of devices and then host memory.
    tp_degree:               by default the fastest that fits.
    n_positions:             by default 2048, or the positions that the model was trained on where those are fewer.
    context_length_estimate: as of `from_pretrained`; by default half of each token bucket.
    quant:                   how weights are quantized; that of a decoder is its own.
    kv_cache_quant:          how keys and values are stored, where not in `amp`.
    strict:                  apply the three rules of the first release of transformers-neuronx instead of padding.
    lower:                   take activations from the lowered program of the largest prompt, which takes seconds,
                             instead of an estimate.

    Raises InputError where the request cannot run; it names what is legal, and the nearest request that runs.
    """
    outline = Outline.of(model, quant)
    if kv_cache_quant is not None:
        outline = outline.with_cache(kv_cache_quant.stored)
    request = _request(outline, batch_size, n_positions, context_length_estimate, amp, strict)
    requested_instance = find(instance) if instance else None
    chosen, degree = _place(request, requested_instance, None if tp_degree is None else integer("tp_degree", tp_degree))
    memory = request.memory(chosen, degree, _lowered(model, quant, request, degree, amp) if lower else None)
    host = host_bytes(request.outline, degree, request.itemsize)
    predict = request.speed(chosen, degree)
    largest_batch = request.largest_batch(chosen, degree)
    rows = sorted({request.batch_size, *(1 << i for i in range(LISTED_ROWS.bit_length()) if 1 << i <= largest_batch)})
    rates = [Rate(b, s, b / s) for b in rows for s in [predict.per_token(b, request.buckets.capacity)]]
    return Plan(
        model_type=request.outline.decoder.model_type,
        parameters=request.outline.parameter_count,
        active_parameters=request.outline.active_parameter_count,
        instance=chosen.name,
        tp_degree=degree,
        batch_size=request.batch_size,
        n_positions=request.buckets.capacity,
        context_length=max(request.buckets.context),
        amp=amp,
        cache_dtype=kv_cache_quant.stored if kv_cache_quant else None,
        memory=memory,
        memory_per_core=chosen.hbm_per_core,
        activations_lowered=lower,
        tight=memory.worst > chosen.hbm_per_core,
        host_bytes=host,
        host_memory=chosen.host_memory,
        padding=padding_note(request.outline, degree),
        degrees=tuple(
            Degree(d, request.refusal(chosen, d), request.memory(chosen, d), request.seconds_per_token(chosen, d))
            for d in chosen.degrees
        ),
        seconds_per_token=request.seconds_per_token(chosen, degree),
        seconds_to_first_token=predict.prompt_seconds(
            request.batch_size, max(request.buckets.context), request.buckets
        ),
        rates=tuple(rates),
        largest_batch=largest_batch,
        largest_n_positions=request.largest_positions(chosen, degree),
        notes=tuple(_notes(request, chosen, degree, memory, host)),
    )


def check(
    model: Mapping[str, Any] | Decoder,
    instance: str,
    tp_degree: int,
    *,
    batch_size: int = 1,
    n_positions: Lengths | None = None,
    context_length_estimate: Lengths | None = None,
    amp: str = "f32",
    strict: bool = False,
) -> None:
    """Raises InputError where `plan` would. `instance` may be a target such as "trn1"."""
    request = _request(model, batch_size, n_positions, context_length_estimate, amp, strict)
    _place(request, find(instance), integer("tp_degree", tp_degree))


def padding_note(model: Mapping[str, Any] | Decoder | Outline, tp_degree: int) -> str | None:
    """One line that says what a degree pads or replicates, and its cost; None where it does neither.

    >>> from jx_neuron.models.known import config_of
    >>> padding_note(config_of("gpt2-xl"), 8)
    'tp_degree=8 pads 25 heads to 32, a vocabulary of 50257 to 50264: 8.8% more weights'
    """
    outline = Outline.of(model)
    return outline.padding(tp_degree).describe(outline.overhead(tp_degree))


def _request(
    model: Mapping[str, Any] | Decoder | Outline,
    batch_size: int,
    n_positions: Lengths | None,
    context_length_estimate: Lengths | None,
    amp: str,
    strict: bool,
) -> Request:
    outline = Outline.of(model)
    config = outline.config
    return Request(
        outline,
        integer("batch_size", batch_size, most=MOST_ROWS),
        Buckets.within(config.max_positions, config.trained_positions, n_positions, context_length_estimate),
        dtype_of(amp).itemsize,
        strict,
    )


def _place(request: Request, instance: Instance | None, tp_degree: int | None) -> tuple[Instance, int]:
    why: str | None
    if tp_degree is not None and instance is None:
        candidates = [
            candidate
            for candidate in INSTANCES
            if request.fits(candidate, tp_degree) and request.fits_host(candidate, tp_degree)
        ]
        if candidates:
            return candidates[0], tp_degree
        why = _why_nowhere(request, tp_degree)
    elif instance is None:
        if (placement := request.cheapest()) is not None:
            return placement
        why = _why_nowhere(request, None)
    else:
        degree = request.best_degree(instance) if tp_degree is None else tp_degree
        why = request.refusal(instance, degree or instance.degrees[-1])
        if degree is not None and why is None:
            return instance, degree
        if tp_degree is None:
            why = f"{instance.name} at its largest degree, {instance.degrees[-1]}: {why}"
        elif tp_degree in instance.degrees:
            why = f"tp_degree={tp_degree} on {instance.name}: {why}"
    options = request.nearest(instance, tp_degree)
    nearest = "Nearest that works: " + "; or ".join(options) if options else "Nothing near it works"
    raise InputError(f"this request cannot run. {why}. {nearest}")


def _why_nowhere(request: Request, tp_degree: int | None) -> str:
    largest = INSTANCES[-1]
    if tp_degree is not None and not any(tp_degree in instance.degrees for instance in INSTANCES):
        legal = sorted({degree for instance in INSTANCES for degree in instance.degrees})
        return f"tp_degree={tp_degree} is not a degree of any instance, which are {', '.join(map(str, legal))}"
    degree = tp_degree if tp_degree in largest.degrees else largest.degrees[-1]
    return f"Even on the largest instance, {largest.name}, at tp_degree={degree}: {request.refusal(largest, degree)}"


def _lowered(
    model: Mapping[str, Any] | Decoder, quant: QuantizationConfig | None, request: Request, tp_degree: int, amp: str
) -> int:
    decoder = model if isinstance(model, Decoder) else replace(Decoder.from_config(model), quant=quant)
    decoder = replace(decoder, tp_degree=tp_degree, state=request.outline.decoder.state)
    keys = request.buckets.programs(request.batch_size, 1)
    largest = max(keys, key=lambda key: key.tokens * key.positions)
    return lowered_activation_bytes(decoder, largest, request.buckets.capacity, dtype_of(amp))


def _notes(request: Request, instance: Instance, tp_degree: int, memory: Memory, host: int) -> list[str]:
    notes = []
    if memory.worst > instance.hbm_per_core:
        notes.append(
            f"tight: with DMA rings as large as any reported a core would need {gib(memory.worst)} of its "
            f"{gib(instance.hbm_per_core)}"
        )
    if not request.fits_host(instance, tp_degree):
        notes.append(
            f"loading the checkpoint takes up to {gib(host)} of host memory and {instance.name} has "
            f"{gib(instance.host_memory or 0)}: save an artifact with sharded weights on a larger host, and load that"
        )
    if beyond := request.outline.config.beyond_training(request.buckets.capacity):
        notes.append(beyond)
    if inferred := (*instance.inferred, *instance.device.inferred):
        notes.append(f"of {instance.name}, these are inferred or unknown: {', '.join(inferred)}")
    return notes
