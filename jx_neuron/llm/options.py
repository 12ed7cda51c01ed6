"""The options of a model's constructors, and the settings that follow from them."""

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast, get_type_hints

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.config import GenerationConfig, NeuronConfig, dtype_of
from jx_neuron.errors import ArtifactError, ConfigError, InputError
from jx_neuron.nn.dtypes import amp_of
from jx_neuron.runtime import deployment
from jx_neuron.step.buckets import MOST_ROWS, Buckets, bucket_sizes
from jx_neuron.util.arguments import integer

if TYPE_CHECKING:  # running a saved model needs no model code
    from jx_neuron.models import Decoder

Lengths = int | Sequence[int]
F = TypeVar("F", bound=Callable[..., Any])


class LoweringOptions(TypedDict, total=False):
    """Options of lowering. `NeuronAutoModelForCausalLM.from_pretrained` describes each option here and below."""

    batch_size: Lengths
    prompt_batch_size: int | None
    n_positions: Lengths | None
    tp_degree: int
    amp: str
    dtype: Any
    context_length_estimate: Lengths | None
    neuron_config: NeuronConfig | None


class ModelOptions(LoweringOptions, total=False):
    """The same, and what runs the programs."""

    backend: str | None


class CheckpointOptions(ModelOptions, total=False):
    """The same, and where a checkpoint comes from."""

    revision: str | None
    token: str | bool | None
    local_files_only: bool | None
    cache_dir: str | os.PathLike[str] | None
    adapter: str | os.PathLike[str] | None
    adapters: Mapping[str, str | os.PathLike[str]] | None
    context_unroll: int | None
    unroll: int | None


DEFAULTS = CheckpointOptions(
    batch_size=1,
    prompt_batch_size=None,
    n_positions=None,
    tp_degree=1,
    amp="f32",
    dtype=None,
    context_length_estimate=None,
    neuron_config=None,
    backend=None,
    revision=None,
    token=None,
    local_files_only=None,
    cache_dir=None,
    adapter=None,
    adapters=None,
    context_unroll=None,
    unroll=None,
)


def accepts(options: type[LoweringOptions]) -> Callable[[F], F]:
    """Gives a function that ends in `**options` a signature that lists them, and calls it with every one of them.

    Options that its caller leaves out have their defaults. Raises TypeError for a name that is not among them.
    """
    hints = get_type_hints(options)
    defaults = {name: value for name, value in DEFAULTS.items() if name in hints}
    listed = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=hints[name])
        for name, value in defaults.items()
    ]

    def decorate(function: F) -> F:
        written = inspect.signature(function)
        *own, _ = written.parameters.values()
        legal = [parameter.name for parameter in (*own[1:], *listed)]

        @functools.wraps(function)
        def with_defaults(*arguments: Any, **keywords: Any) -> Any:
            if unknown := sorted(set(keywords) - set(legal)):
                raise TypeError(f"{function.__name__}() takes no {unknown[0]!r}; it takes {', '.join(legal)}")
            return function(*arguments, **(defaults | _with_amp(keywords)))

        cast(Any, with_defaults).__signature__ = written.replace(parameters=[*own, *listed])
        return cast(F, with_defaults)

    return decorate


def _with_amp(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords whose `dtype`, where there is one, is their `amp`. Raises ConfigError for two that differ."""
    if (dtype := keywords.get("dtype")) is None:
        return keywords
    amp = amp_of(dtype)
    if "amp" in keywords and dtype_of(keywords["amp"]) != dtype_of(amp):
        raise ConfigError(f"amp={keywords['amp']!r} and dtype={dtype!r} differ; they are two names of one option")
    return {**keywords, "amp": amp}


def as_stored(decoder: "Decoder", options: LoweringOptions) -> "Decoder":
    """The decoder with weights, keys and values stored as `options` say. Raises ConfigError where they cannot be."""
    config = _neuron_config(options)
    decoder = dataclasses.replace(decoder, quant=config.quant)
    if config.speculation_length:
        decoder = decoder.with_drafts()
    if (cache := config.kv_cache_quant) is None:
        return decoder
    if cache.dequant_dtype is not None and dtype_of(cache.dequant_dtype) != dtype_of(options["amp"]):
        raise ConfigError(
            f"dequant_dtype={cache.dequant_dtype!r} is not amp={options['amp']!r}, in which attention computes; leave "
            "it out, or change amp"
        )
    return decoder.with_cache(cache.stored)


def _neuron_config(options: LoweringOptions) -> NeuronConfig:
    return options["neuron_config"] or NeuronConfig()


def require_saved(options: ModelOptions, settings: Settings) -> None:
    """Raises ArtifactError for an option that is given, and not what a model was saved for."""
    lengths, estimate = options["n_positions"], options["context_length_estimate"]
    tokens = None if lengths is None else Buckets.of(lengths).tokens
    context = None if estimate is None else Buckets.of(settings.buckets.tokens, estimate).context
    quant = _neuron_config(options).kv_cache_quant
    for name, value, default, saved in (
        ("tp_degree", options["tp_degree"], 1, settings.tp_degree),
        ("dtype", dtype_of(options["amp"]), dtype_of("f32"), settings.dtype),
        ("batch_size", tuple(np.atleast_1d(options["batch_size"]).tolist()), (1,), tuple(settings.batch_sizes)),
        ("prompt_batch_size", options["prompt_batch_size"], None, settings.prompt_batch),
        ("n_positions", tokens, None, settings.buckets.tokens),
        ("context_length_estimate", context, None, settings.buckets.context),
        ("quant", _neuron_config(options).quant, None, settings.quant),
        ("kv_cache_quant", quant and quant.stored, None, settings.cache_dtype),
        ("speculation_length", _neuron_config(options).speculation_length, (), settings.speculation),
    ):
        if value not in (default, saved):
            raise ArtifactError(f"it was saved for {name}={saved} and not {value}; leave that out, or save again")


def settings_of(
    decoder: "Decoder", options: LoweringOptions, backend: str, generation: Mapping[str, Any] | None = None
) -> Settings:
    """The settings that `options`, all of them, give a decoder.

    generation: the ids of the end and padding tokens.

    Warns of positions that the model was not trained on, and of what the degree pads. Raises InputError or ConfigError
    for what is not possible: on the machine of backend "neuron", and with "host" on any.
    """
    config, neuron_config = decoder.config, _neuron_config(options)
    buckets = Buckets.within(
        config.max_positions, config.trained_positions, options["n_positions"], options["context_length_estimate"]
    )
    vocab_size = config.sizes["v"]
    settings = Settings(
        decoder.model_type,
        decoder.tp_degree,
        options["amp"],
        batch_sizes := bucket_sizes("batch_size", options["batch_size"], MOST_ROWS),
        buckets,
        _candidates(neuron_config.on_device_generation or GenerationConfig(), vocab_size),
        neuron_config.output_all_logits,
        vocab_size,
        generation=generation or {},
        prompt_batch=_prompt_batch(options["prompt_batch_size"], batch_sizes),
        rotations=config.rotations,
        window=decoder.window,
        state=decoder.slot(buckets.capacity),
        state_dtypes=decoder.state_dtypes,
        quant=decoder.quant,
        speculation=neuron_config.speculation_length,
        adapters=decoder.adapters,
    )
    _require_possible(decoder, settings, backend, strict=neuron_config.strict_sharding)
    for note in _notes(decoder, settings):
        warnings.warn(note, UserWarning, stacklevel=5)
    return settings


def warn_if_widened(settings: Settings, bits: int | None) -> None:
    """Warns of a checkpoint of integers of `bits` bits that is loaded in more than `quant` would keep."""
    if settings.quant is None and bits and (bits <= 4 or bits == 8):
        warnings.warn(
            f"the checkpoint has weights of {bits} bits, which are widened to {settings.amp}. "
            f"--quant {'int4' if bits <= 4 else 'int8'}, or NeuronConfig(quant=…), keeps them in {max(bits, 4)} bits",
            UserWarning,
            stacklevel=5,
        )


def _candidates(generation_config: GenerationConfig, vocab_size: int) -> int:
    return min(generation_config.global_top_k, vocab_size // 8 * 8 or 1)


def _prompt_batch(prompt_batch_size: int | None, batch_sizes: Sequence[int]) -> int | None:
    if prompt_batch_size is None:
        return None
    prompt_batch = integer("prompt_batch_size", prompt_batch_size)
    if len(batch_sizes) != 1 or batch_sizes[0] % prompt_batch:
        sizes = batch_sizes[0] if len(batch_sizes) == 1 else list(batch_sizes)
        raise InputError(f"prompt_batch_size={prompt_batch} goes with one batch_size that it divides, and not {sizes}")
    return prompt_batch


def _notes(decoder: "Decoder", settings: Settings) -> Iterator[str]:
    from jx_neuron import planning
    from jx_neuron.nn import quantizing

    for note in (
        decoder.config.beyond_training(settings.buckets.capacity),
        planning.padding_note(decoder, settings.tp_degree),
        *quantizing.notes(decoder.forms, decoder.quant),
    ):
        if note:
            yield note


def _require_possible(decoder: "Decoder", settings: Settings, backend: str, *, strict: bool) -> None:
    from jx_neuron import planning
    from jx_neuron.planning import limits

    limits.check_degree(decoder, settings.tp_degree)
    if strict:
        decoder.padding.require_exact()
    if backend == "neuron":
        planning.check(
            decoder,
            deployment.target_for(settings.target),
            settings.tp_degree,
            batch_size=settings.slots,
            n_positions=list(settings.buckets.tokens),
            context_length_estimate=list(settings.buckets.context),
            amp=settings.amp,
        )
    elif backend == "host":
        limits.check_devices(
            decoder, settings.tp_degree, settings.slots, settings.buckets.capacity, settings.dtype.itemsize
        )
