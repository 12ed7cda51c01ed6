"""What a user holds: a decoder with its weights, made from a checkpoint, and asked for tokens or logits."""

import dataclasses
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.folder import Checkpoint, open_checkpoint, token_ids
from jx_neuron.config import GenerationConfig, NeuronConfig, dtype_of
from jx_neuron.engine.answering import Answering
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.rotations import Rotations
from jx_neuron.engine.scheduler import Scheduler
from jx_neuron.errors import ArtifactError, CheckpointError, ConfigError, InputError
from jx_neuron.runtime import deployment as deploy
from jx_neuron.runtime.base import Runtime
from jx_neuron.runtime.deployment import Deployment, Saved
from jx_neuron.step.buckets import MOST_ROWS, Buckets, bucket_sizes
from jx_neuron.util.arguments import integer

if TYPE_CHECKING:  # running a saved model needs no model code
    from flax import nnx

    from jx_neuron.checkpoint.hf_config import HFConfig
    from jx_neuron.checkpoint.weights import Source, W
    from jx_neuron.models import Decoder

Lengths = int | Sequence[int]
GENERATION_FIELDS = ("eos_token_id", "pad_token_id")


class NeuronAutoModelForCausalLM(Answering):
    """A decoder of any supported family.

    Made by `from_pretrained` or `from_module`. `to_neuron` reads its weights and readies its programs (the first use
    does, where it was not called); then `sample` and `stream` give tokens, and calling it gives logits. `save` keeps
    what was lowered and compiled.
    """

    MODEL_TYPE: ClassVar[str | None] = None

    def __init__(
        self,
        settings: Settings,
        config: Mapping[str, Any],
        *,
        backend: str,
        neuron_config: NeuronConfig,
        decoder: "Decoder | None" = None,
        source: "Source | None" = None,
        checkpoint: Checkpoint | None = None,
        saved: Saved | None = None,
    ):
        self.settings, self.config, self.backend, self.neuron_config = settings, dict(config), backend, neuron_config
        self._decoder, self._source, self._checkpoint, self._saved = decoder, source, checkpoint, saved
        self._deployment: Deployment | None = saved.deployment if saved else None
        self._engine: Engine | None = None
        self._making, self._last = threading.RLock(), threading.local()
        generation_config = neuron_config.on_device_generation
        self.generation_config = None if generation_config is None else self._own(generation_config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        batch_size: Lengths = 1,
        prompt_batch_size: int | None = None,
        n_positions: Lengths | None = None,
        tp_degree: int = 1,
        amp: str = "f32",
        context_length_estimate: Lengths | None = None,
        context_unroll: int | None = None,
        unroll: int | None = None,
        neuron_config: NeuronConfig | None = None,
        backend: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Opens a checkpoint: a folder, a file of weights, or a Hugging Face hub id; or a folder that `save` wrote.

        batch_size:              most rows of a call, or a list of batch buckets; a call of fewer is padded.
        prompt_batch_size:       most prompts of a call, where each is given batch_size / prompt_batch_size answers:
                                 prompts go through once, and their keys and values are copied. It divides batch_size.
        n_positions:             longest sequence, prompt and answer together, or a list of token buckets; by default
                                 2048, or what the model was trained on where that is less.
        tp_degree:               how many cores share the model.
        amp:                     dtype of weights and cache: f32, f16 or bf16.
        context_length_estimate: longest prompt that goes through in one piece, or a list of context buckets.
        context_unroll, unroll:  of transformers-neuronx; have no effect: programs for Neuron have every layer.
        backend:                 "xla" runs the model through jax.jit, "host" runs its lowered programs on host
                                 devices, "neuron" runs what neuronx-cc makes of them; by default neuron where there
                                 is one, else xla.

        Names and shapes of all tensors are checked here; `to_neuron` reads them. A saved model with weights is what it
        was saved for: arguments that ask for another shape are refused.

        Raises CheckpointError, ArtifactError, ConfigError or InputError that says what cannot be had.
        """
        asked, backend = backend, deploy.choose_backend(backend)
        neuron_config = neuron_config or NeuronConfig()
        if deploy.is_artifact(pretrained_model_name_or_path):
            if asked == "xla":
                raise ArtifactError("a saved model holds programs and no model code; its backend is host or neuron")
            saved = Saved.open(os.fspath(pretrained_model_name_or_path))
            saved.settings.require(tp_degree, amp, batch_size, n_positions, context_length_estimate)
            return cls._from_saved(saved, backend, neuron_config)
        from jx_neuron.models import Decoder

        dtype = dtype_of(amp)
        checkpoint = open_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
        cls._check_family(checkpoint.config.get("model_type"))
        decoder = Decoder.from_config(checkpoint.config, integer("tp_degree", tp_degree), checkpoint)
        settings = _settings(
            decoder, batch_size, prompt_batch_size, n_positions, context_length_estimate, amp, neuron_config
        )
        _check_plan(decoder, settings, backend, neuron_config)
        settings = dataclasses.replace(
            settings, generation=_generation(checkpoint.config, checkpoint.generation_config or {})
        )
        return cls(
            settings,
            checkpoint.config,
            backend=backend,
            neuron_config=neuron_config,
            decoder=decoder,
            source=decoder.source(checkpoint, dtype),
            checkpoint=checkpoint,
        )

    @classmethod
    def from_module(
        cls,
        module: "nnx.Module",
        config: "HFConfig",
        *,
        weights: "Sequence[W]" = (),
        batch_size: Lengths = 1,
        prompt_batch_size: int | None = None,
        n_positions: Lengths | None = None,
        tp_degree: int = 1,
        amp: str = "f32",
        context_length_estimate: Lengths | None = None,
        neuron_config: NeuronConfig | None = None,
        backend: str | None = None,
    ) -> Self:
        """Takes a decoder with its parameters in hand, such as one just trained, and no checkpoint.

        `module` does as the families' `Model` does; `weights` is its weight table, which says how parameters are split,
        and may be left out at a `tp_degree` of 1. The other arguments are those of `from_pretrained`.
        """
        from jx_neuron.checkpoint import weights as loading
        from jx_neuron.models import Decoder

        neuron_config = neuron_config or NeuronConfig()
        decoder = Decoder.from_module(module, config, weights, integer("tp_degree", tp_degree))
        settings = _settings(
            decoder, batch_size, prompt_batch_size, n_positions, context_length_estimate, amp, neuron_config
        )
        backend = deploy.choose_backend(backend)
        _check_plan(decoder, settings, backend, neuron_config)
        source = loading.from_params(loading.flatten(module), decoder.rows, decoder.padding, dtype_of(amp))
        return cls(
            settings,
            {"model_type": config.MODEL_TYPE, **config.to_hf()},
            backend=backend,
            neuron_config=neuron_config,
            decoder=decoder,
            source=source,
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        batch_size: Lengths = 1,
        prompt_batch_size: int | None = None,
        n_positions: Lengths | None = None,
        tp_degree: int = 1,
        amp: str = "f32",
        context_length_estimate: Lengths | None = None,
        neuron_config: NeuronConfig | None = None,
    ) -> Self:
        """Takes what a config.json says, and no weights: for `cpu_compile` and `save`, and a later `load` of it.

        The arguments are those of `from_pretrained`.
        """
        from jx_neuron.models import Decoder

        neuron_config = neuron_config or NeuronConfig()
        cls._check_family(config.get("model_type"))
        decoder = Decoder.from_config(config, integer("tp_degree", tp_degree))
        settings = _settings(
            decoder, batch_size, prompt_batch_size, n_positions, context_length_estimate, amp, neuron_config
        )
        _check_plan(decoder, settings, "host", neuron_config)
        settings = dataclasses.replace(settings, generation=_generation(config))
        return cls(settings, config, backend="host", neuron_config=neuron_config, decoder=decoder)

    @classmethod
    def _from_saved(cls, saved: Saved, backend: str, neuron_config: NeuronConfig) -> Self:
        manifest = saved.artifact.manifest
        cls._check_family(saved.settings.model_type)
        if saved.parameters is None:
            raise ArtifactError(
                f"{saved.artifact.directory} was saved without weights; make the model from its checkpoint and load() "
                "this folder, or save with sharded_weights=True"
            )
        backend = "host" if backend == "xla" else backend
        return cls(saved.settings, manifest.config, backend=backend, neuron_config=neuron_config, saved=saved)

    @classmethod
    def _check_family(cls, model_type: Any) -> None:
        if cls.MODEL_TYPE not in (None, model_type):
            raise ConfigError(
                f"{cls.__name__} takes models of model_type {cls.MODEL_TYPE!r} and this one is of {model_type!r}; "
                "NeuronAutoModelForCausalLM takes any"
            )

    def to_neuron(self) -> Self:
        """Reads the weights onto the devices and readies the programs.

        With backend "xla", a program is compiled when it is first needed; with "neuron", neuronx-cc compiles those that
        no `load` brought. Raises CompilerError where that cannot be.
        """
        with self._making:
            if self._engine is None:
                jobs, on, of = self.neuron_config.compilation_worker_count, self.backend, self.settings
                if on == "host":
                    self._check_host(of.buckets.capacity)
                runtime = self._xla() if on == "xla" else self.lowered().run_on(on, self._parameters, jobs)
                self._engine = Engine(runtime, self._scheduler(), of.vocab_size, self._first_not_finite)
        return self

    def _scheduler(self) -> Scheduler:
        settings, on_demand = self.settings, self.backend == "xla"
        return Scheduler(
            settings.buckets,
            settings.batch_sizes,
            [settings.prompt_batch] if settings.prompt_batch else None,
            None if on_demand else settings.buckets.context[-1:],
            candidates=None if on_demand else settings.candidates,
            rotations=None if settings.rotations is None else Rotations(*settings.rotations),
        )

    def lowered(self) -> Deployment:
        """The programs as they go to neuronx-cc, made when first asked for."""
        with self._making:
            if self._deployment is None:
                self._deployment = deploy.lower(self._decoder, self.settings)
            return self._deployment

    def cpu_compile(self, target: str | None = None) -> Self:
        """Lowers, checks and compiles for Neuron without a device, so that `save` can follow.

        target: inf2, trn1, trn1n, trn2 or trn3; by default what NEURON_CC_FLAGS says, then this machine's, then trn1.

        Raises LoweringError for programs that the target cannot run, and CompilerError without neuronx-cc; `save` alone
        needs none, and keeps the lowered programs.
        """
        self.lowered().compile(target, self.neuron_config.compilation_worker_count)
        return self

    def save(self, directory: str | os.PathLike[str], *, sharded_weights: bool = False) -> Path:
        """Writes what was lowered and compiled, the tokenizer, and with `sharded_weights` each core's weights.

        The folder is written whole or not at all. With weights, `from_pretrained(directory)` is all that is needed to
        run it; without, `load(directory)` spares a model made from the checkpoint its compilation.
        """
        return deploy.save(
            os.fspath(directory),
            self.lowered(),
            self.config,
            self._parameters if sharded_weights else None,
            getattr(self._checkpoint or self._saved, "save_tokenizer", None),
        )

    def load(self, directory: str | os.PathLike[str]) -> Self:
        """Takes the programs that `save` wrote, so that `to_neuron` need not lower and compile them.

        Raises ArtifactError where they were made for another model, degree, dtype, batch or buckets.
        """
        saved = Saved.open(os.fspath(directory))
        mine, theirs = self.settings.as_dict(), saved.settings.as_dict()
        differing = [key for key in mine if key not in ("generation", "target") and mine[key] != theirs[key]]
        if differing or not self._is_of(saved.artifact.manifest.config):
            what = ", ".join(f"{key}={theirs[key]!r} and not {mine[key]!r}" for key in differing) or "another config"
            raise ArtifactError(f"{directory} was saved for {what}; make the model with the same, or save it anew")
        self._deployment = saved.deployment
        return self

    def _is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes this model, whatever else it says."""
        if self._decoder is None:
            return config == self.config
        return type(self._decoder.config).from_hf(config) == self._decoder.config

    def _xla(self) -> Runtime:
        from jx_neuron.runtime import xla

        assert self._decoder is not None
        mesh = xla.mesh(self.settings.tp_degree)
        if mesh.devices.flat[0].platform == "cpu":
            self._check_host(self.settings.buckets.tokens[0])
        return xla.XlaRuntime(self._decoder, self._weights(), mesh, self.settings.dtype)

    def _check_host(self, slots: int) -> None:
        """Raises InputError where this machine cannot hold the weights and the smallest cache, of so many positions."""
        if self._decoder is not None:  # running a saved model needs no model code
            from jx_neuron.planning import limits

            of = self.settings
            limits.check_host(self._decoder, of.tp_degree, of.batch_sizes[0], slots, of.dtype.itemsize)

    @property
    def _parameters(self) -> "Mapping[str, Sequence[np.ndarray]]":
        if self._saved is not None and self._saved.parameters is not None:
            return self._saved.parameters
        return self._weights().parts(self.settings.tp_degree)

    def _first_not_finite(self) -> str | None:
        """The first tensor that holds a NaN or an infinity once it is cast; all are read anew."""
        from jx_neuron.checkpoint.weights import first_not_finite

        if self._saved is not None:
            return first_not_finite(self._parameters)
        source = self._weights()
        path = first_not_finite(source.parts(1))
        return None if path is None else source.name(path)

    def __repr__(self) -> str:
        settings = self.settings
        path = self._checkpoint.path if self._checkpoint else self._saved.artifact.directory if self._saved else None
        fields: dict[str, Any] = {"path": str(path)} if path else {}
        fields |= {"model_type": settings.model_type, "batch_size": self.batch_size}
        fields |= {"n_positions": self.buckets.capacity, "tp_degree": settings.tp_degree}
        fields |= {"amp": settings.amp, "backend": self.backend}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: it holds compiled programs and memory of devices. "
            "Threads may share it; another process makes its own with from_pretrained"
        )

    def _weights(self) -> "Source":
        if self._source is None:
            raise CheckpointError(
                "this model was made from a config alone; make it with from_pretrained to have weights"
            )
        return self._source

    @property
    def engine(self) -> Engine:
        """What runs the programs, and whose turn it is."""
        self.to_neuron()
        assert self._engine is not None
        return self._engine

    @property
    def runtime(self) -> Runtime:
        """What runs the programs."""
        return self.engine.runtime

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, an HF one. Raises InputError where the model came without."""
        if self._checkpoint is not None:
            return self._checkpoint.tokenizer()
        if self._saved is not None:
            return self._saved.tokenizer()
        raise InputError("this model was made from a module, without a checkpoint, and has no tokenizer")


class BloomForSampling(NeuronAutoModelForCausalLM):
    """BLOOM."""

    MODEL_TYPE = "bloom"


class GPT2ForSampling(NeuronAutoModelForCausalLM):
    """GPT-2."""

    MODEL_TYPE = "gpt2"


class GPTJForSampling(NeuronAutoModelForCausalLM):
    """GPT-J."""

    MODEL_TYPE = "gptj"


class GPTNeoXForSampling(NeuronAutoModelForCausalLM):
    """GPT-NeoX and Pythia."""

    MODEL_TYPE = "gpt_neox"


class LlamaForSampling(NeuronAutoModelForCausalLM):
    """Llama, and what shares its architecture: CodeLlama, SmolLM2, and others of model_type llama."""

    MODEL_TYPE = "llama"


class GPT2ForSamplingWithContextBroadcasting(GPT2ForSampling):
    """GPT-2, made with prompt_batch_size: one prompt, many answers. Every other family's class does so too."""


class OPTForSampling(NeuronAutoModelForCausalLM):
    """OPT."""

    MODEL_TYPE = "opt"


def _generation(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the end and padding tokens: of a config.json, and of a generation_config.json that comes before it."""
    ids = [token_ids(config, "the config") for config in configs]
    return {key: next((of[key] for of in reversed(ids) if of.get(key) is not None), None) for key in GENERATION_FIELDS}


def _settings(
    decoder: "Decoder",
    batch_size: Lengths,
    prompt_batch_size: int | None,
    n_positions: Lengths | None,
    context_length_estimate: Lengths | None,
    amp: str,
    neuron_config: NeuronConfig,
) -> Settings:
    config = decoder.config
    buckets = Buckets.within(config.max_positions, config.trained_positions, n_positions, context_length_estimate)
    if note := config.beyond_training(buckets.capacity):
        warnings.warn(note, UserWarning, stacklevel=3)
    batches = bucket_sizes("batch_size", batch_size, MOST_ROWS)
    if prompt_batch_size is not None:
        prompt_batch_size = integer("prompt_batch_size", prompt_batch_size)
        if len(batches) != 1 or batches[0] % prompt_batch_size:
            raise InputError(
                f"prompt_batch_size={prompt_batch_size} goes with one batch_size that it divides, and not {batch_size}"
            )
    vocab_size = decoder.config.sizes["v"]
    generation = neuron_config.on_device_generation or GenerationConfig()
    return Settings(
        decoder.model_type,
        decoder.tp_degree,
        amp,
        batches,
        buckets,
        min(generation.global_top_k, vocab_size // 8 * 8 or 1),
        neuron_config.output_all_logits,
        vocab_size,
        prompt_batch=prompt_batch_size,
        rotations=decoder.config.rotations,
    )


def _check_plan(decoder: "Decoder", settings: Settings, backend: str, neuron_config: NeuronConfig) -> None:
    """Says what the degree pads and what it costs. Raises InputError for what cannot be had: on the device, on any."""
    from jx_neuron import planning
    from jx_neuron.planning import limits

    limits.check_degree(decoder, settings.tp_degree)
    if neuron_config.strict_sharding:
        decoder.padding.demand_exact()
    if note := planning.padding_note(decoder, settings.tp_degree):
        warnings.warn(note, UserWarning, stacklevel=3)
    if backend == "neuron":
        planning.check(
            decoder,
            deploy.target_for(settings.target),
            settings.tp_degree,
            batch_size=settings.batch_sizes[-1],
            n_positions=list(settings.buckets.tokens),
            context_length_estimate=list(settings.buckets.context),
            amp=settings.amp,
        )
    elif backend == "host":
        limits.check_devices(
            decoder,
            settings.tp_degree,
            settings.batch_sizes[-1],
            settings.buckets.capacity,
            settings.dtype.itemsize,
        )
