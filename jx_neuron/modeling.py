"""What a user holds: a decoder with its weights, made from a checkpoint, and asked for tokens or logits."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from jx_neuron import deploy
from jx_neuron.checkpoint import Checkpoint, open_checkpoint
from jx_neuron.config import GenerationConfig, NeuronConfig, dtype_of
from jx_neuron.deploy import Deployment, Saved, Settings
from jx_neuron.errors import ArtifactError, CheckpointError, ConfigError, InputError
from jx_neuron.generation import loop, prompts
from jx_neuron.lowering.buckets import Buckets
from jx_neuron.runtime import Runtime

if TYPE_CHECKING:  # running a saved model needs no model code
    from flax import nnx

    from jx_neuron.hf_config import HFConfig
    from jx_neuron.models import Decoder
    from jx_neuron.weights import Source, W

Lengths = int | Sequence[int]
DEFAULT_POSITIONS = 2048
GENERATION_FIELDS = ("eos_token_id", "pad_token_id")


class NeuronAutoModelForCausalLM:
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
        self._runtime: Runtime | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        batch_size: int = 1,
        n_positions: Lengths | None = None,
        tp_degree: int = 1,
        amp: str = "f32",
        context_length_estimate: Lengths | None = None,
        neuron_config: NeuronConfig | None = None,
        backend: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Opens a checkpoint: a folder, a .gguf file, or a Hugging Face hub id; or a folder that `save` wrote.

        batch_size:              rows of every call.
        n_positions:             longest sequence, prompt and answer together, or a list of token buckets; by default
                                 2048, or what the model has positions for where that is less.
        tp_degree:               how many cores share the model.
        amp:                     dtype of weights and cache: f32, f16 or bf16.
        context_length_estimate: longest prompt that goes through in one piece, or a list of context buckets.
        backend:                 "xla" runs the model through jax.jit, "host" runs its lowered programs on host
                                 devices, "neuron" runs what neuronx-cc makes of them; by default neuron where there
                                 is one, else xla.

        Names and shapes of all tensors are checked here; `to_neuron` reads them. A saved model with weights is what it
        was saved for: the arguments that shape a model are then not taken from here.

        Raises CheckpointError, ArtifactError, ConfigError or InputError that says what cannot be had.
        """
        backend = deploy.choose_backend(backend)
        neuron_config = neuron_config or NeuronConfig()
        if deploy.is_artifact(pretrained_model_name_or_path):
            return cls._from_saved(Saved.open(os.fspath(pretrained_model_name_or_path)), backend, neuron_config)
        from jx_neuron import weights
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
        decoder = Decoder.from_config(checkpoint.config, _positive("tp_degree", tp_degree))
        settings = _settings(decoder, batch_size, n_positions, context_length_estimate, amp, neuron_config)
        told = {**checkpoint.config, **{k: v for k, v in (checkpoint.generation_config or {}).items() if v is not None}}
        settings = dataclasses.replace(settings, generation={key: told.get(key) for key in GENERATION_FIELDS})
        rows = weights.match(
            decoder.table, decoder.ignore, decoder.shapes, decoder.config.layers, decoder.padding, checkpoint
        )
        return cls(
            settings,
            checkpoint.config,
            backend=backend,
            neuron_config=neuron_config,
            decoder=decoder,
            source=weights.from_checkpoint(rows, decoder.padding, checkpoint, dtype),
            checkpoint=checkpoint,
        )

    @classmethod
    def from_module(
        cls,
        module: "nnx.Module",
        config: "HFConfig",
        *,
        weights: "Sequence[W]" = (),
        batch_size: int = 1,
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
        from jx_neuron import weights as loading
        from jx_neuron.models import Decoder

        neuron_config = neuron_config or NeuronConfig()
        decoder = Decoder.from_module(module, config, weights, _positive("tp_degree", tp_degree))
        source = loading.from_params(loading.flatten(module), decoder.rows, decoder.padding, dtype_of(amp))
        return cls(
            _settings(decoder, batch_size, n_positions, context_length_estimate, amp, neuron_config),
            {"model_type": config.MODEL_TYPE, **config.to_hf()},
            backend=deploy.choose_backend(backend),
            neuron_config=neuron_config,
            decoder=decoder,
            source=source,
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        batch_size: int = 1,
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
        decoder = Decoder.from_config(config, _positive("tp_degree", tp_degree))
        settings = _settings(decoder, batch_size, n_positions, context_length_estimate, amp, neuron_config)
        settings = dataclasses.replace(settings, generation={key: config.get(key) for key in GENERATION_FIELDS})
        return cls(settings, config, backend="host", neuron_config=neuron_config, decoder=decoder)

    @classmethod
    def _from_saved(cls, saved: Saved, backend: str, neuron_config: NeuronConfig) -> Self:
        manifest = saved.artifact.manifest
        cls._check_family(manifest.model_type)
        if saved.weights is None:
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

    @property
    def batch_size(self) -> int:
        """Rows of every call."""
        return self.settings.batch_size

    @property
    def buckets(self) -> Buckets:
        """The lengths that programs are compiled for."""
        return self.settings.buckets

    def to_neuron(self) -> Self:
        """Reads the weights onto the devices and readies the programs.

        With backend "xla", a program is compiled when it is first needed; with "neuron", neuronx-cc compiles those that
        no `load` brought. Raises CompilerError where that cannot be.
        """
        if self._runtime is None:
            jobs = self.neuron_config.compilation_worker_count
            on = self.backend
            self._runtime = self._xla() if on == "xla" else self.lowered().run_on(on, self._ranks, jobs)
        return self

    def lowered(self) -> Deployment:
        """The programs as they go to neuronx-cc, made when first asked for."""
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
            self._ranks if sharded_weights else None,
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
        from jx_neuron import sharding
        from jx_neuron.runtime.xla import XlaRuntime

        assert self._decoder is not None
        sharding.request_devices(self.settings.tp_degree)
        mesh = sharding.mesh(self.settings.tp_degree)
        return XlaRuntime(self._decoder, self._weights().place(mesh), mesh, self.settings.dtype)

    @cached_property
    def _ranks(self) -> Callable[[int], Mapping[str, np.ndarray]]:
        if self._saved is not None and self._saved.weights is not None:
            return self._saved.weights
        return self._weights().ranks(self.settings.tp_degree).__getitem__

    def _weights(self) -> "Source":
        if self._source is None:
            raise CheckpointError("this model was made from a config alone; make it with from_pretrained to have weights")
        return self._source

    @property
    def runtime(self) -> Runtime:
        """What runs the programs."""
        self.to_neuron()
        assert self._runtime is not None
        return self._runtime

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, an HF one. Raises InputError where the model came without."""
        if self._checkpoint is not None:
            return self._checkpoint.tokenizer()
        if self._saved is not None:
            return self._saved.tokenizer()
        raise InputError("this model was made from a module, without a checkpoint, and has no tokenizer")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row, by generation_config.json or else config.json."""
        given = self.settings.generation.get("eos_token_id")
        return () if given is None else tuple(np.atleast_1d(given).tolist())

    def __call__(self, input_ids: Any, cache_ids: Any = None, start_ids: Any = None) -> np.ndarray:
        """Logits after the last token of each row, float32 [b, v]; of every token [b, t, v] with `output_all_logits`.

        input_ids: [b, t] integers, as lists, numpy, jax or torch.
        cache_ids: None for prompts, which empty the cache first; or the position of the first token, to go on from it.
        start_ids: [b], the first real position of each left-padded row.

        Raises InputError where the compiled model cannot take them.
        """
        ids_bt, _ = prompts.as_array(input_ids)
        rows = self._check(ids_bt, start_ids, None, ids_bt.shape[1])
        start_b = np.zeros(len(rows), np.int32)
        if cache_ids is not None:
            start_b += int(np.asarray(cache_ids).reshape(-1)[0])
            if start_ids is not None:
                start_b -= np.asarray(start_ids, np.int32).reshape(-1)
        all_logits = self.neuron_config.output_all_logits
        logits = loop.logits(self.runtime, rows, start_b, self.buckets, all_logits, fresh=cache_ids is None)
        return logits[..., : self.settings.vocab_size]

    def sample(
        self,
        input_ids: Any,
        sequence_length: int,
        start_ids: Any = None,
        *,
        attention_mask: Any = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        eos_token_override: int | Sequence[int] | None = None,
        seed: int | None = None,
        streamer: Any = None,
    ) -> Any:
        """Continues each row up to `sequence_length` tokens, the prompt counted, or until all rows have ended.

        input_ids:          [b, t] integers, as lists, numpy, jax or torch.
        start_ids:          [b], the first real position of each left-padded row; or give attention_mask [b, t].
        top_k:              1 is greedy, 0 keeps the whole vocabulary; 50 where no GenerationConfig says otherwise.
        top_p, temperature: 1.0 each by default; a temperature of 0 is greedy. All three may be given one a row.
        eos_token_override: the token or tokens that end a row, instead of the checkpoint's; -1 for none.
        seed:               the same seed gives a row the same tokens in any batch, bucket and degree; None draws one.
        streamer:           an HF streamer; its put() gets the prompt, then the tokens of each step.

        Returns ids [b, up to sequence_length] in the kind that was given, prompt first; a row that has ended goes on in
        the padding token (the end token where the checkpoint has none). Raises InputError before anything runs where
        the compiled model cannot take the call.
        """
        ids_bt, restore = prompts.as_array(input_ids)
        tokens = [ids_bt]
        if streamer is not None:
            streamer.put(restore(ids_bt))
        for token_b, _ in self.stream(
            ids_bt,
            sequence_length,
            start_ids,
            attention_mask=attention_mask,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            eos_token_override=eos_token_override,
            seed=seed,
        ):
            tokens.append(token_b[:, None])
            if streamer is not None:
                streamer.put(restore(token_b[:, None])[:, 0])
        if streamer is not None:
            streamer.end()
        return restore(np.concatenate(tokens, axis=1))

    def stream(
        self,
        input_ids: Any,
        sequence_length: int,
        start_ids: Any = None,
        *,
        attention_mask: Any = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        eos_token_override: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens of `sample` as they are made: pairs of ids [b] and whether each row has ended [b]."""
        ids_bt, _ = prompts.as_array(input_ids)
        width = ids_bt.shape[1]
        rows = self._check(ids_bt, start_ids, attention_mask, sequence_length)
        draw = self._draw(top_k, top_p, temperature, seed)
        override = None if eos_token_override is None else np.atleast_1d(eos_token_override).tolist()
        eos = self.eos_token_ids if override is None else tuple(id for id in override if id >= 0)
        pad = self.settings.generation.get("pad_token_id")
        if pad is None:
            pad = eos[0] if eos else 0
        return loop.answer(self.runtime, rows, self.buckets, draw, sequence_length - width, eos, pad)

    def _check(self, ids_bt: np.ndarray, start_ids: Any, attention_mask: Any, length: int) -> list[np.ndarray]:
        prompts.check(
            ids_bt,
            batch=self.batch_size,
            vocab_size=self.settings.vocab_size,
            capacity=self.buckets.capacity,
            length=length,
        )
        return prompts.rows_of(ids_bt, start_ids, attention_mask, padding_side=self.neuron_config.padding_side)

    def _draw(self, top_k: Any, top_p: Any, temperature: Any, seed: int | None) -> loop.Draw:
        fallback = self.neuron_config.on_device_generation or GenerationConfig(do_sample=True)
        if top_k is None:
            top_k = fallback.top_k if fallback.do_sample else 1
        return loop.Draw.of(
            self.batch_size,
            top_k=top_k,
            top_p=fallback.top_p if top_p is None else top_p,
            temperature=fallback.temperature if temperature is None else temperature,
            seed=seed,
            global_top_k=fallback.global_top_k,
            vocab_size=self.settings.vocab_size,
            compiled=None if self.backend == "xla" else self.settings.candidates,
        )


class GPT2ForSampling(NeuronAutoModelForCausalLM):
    """GPT-2."""

    MODEL_TYPE = "gpt2"


class GPTJForSampling(NeuronAutoModelForCausalLM):
    """GPT-J."""

    MODEL_TYPE = "gptj"


class LlamaForSampling(NeuronAutoModelForCausalLM):
    """Llama, and what shares its architecture: CodeLlama, SmolLM2, and others of model_type llama."""

    MODEL_TYPE = "llama"


class OPTForSampling(NeuronAutoModelForCausalLM):
    """OPT."""

    MODEL_TYPE = "opt"


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} is not legal; it takes a positive integer")
    return value


def _settings(
    decoder: "Decoder",
    batch_size: int,
    n_positions: Lengths | None,
    context_length_estimate: Lengths | None,
    amp: str,
    neuron_config: NeuronConfig,
) -> Settings:
    most = decoder.config.max_positions
    if n_positions is None:
        n_positions = min(DEFAULT_POSITIONS, most or DEFAULT_POSITIONS)
    buckets = Buckets.of(n_positions, context_length_estimate)
    if most is not None and buckets.capacity > most:
        raise InputError(
            f"n_positions={buckets.capacity} exceeds the {most} positions that this {decoder.model_type} has; "
            f"ask for at most {most}"
        )
    vocab_size = decoder.config.sizes["v"]
    generation = neuron_config.on_device_generation or GenerationConfig()
    return Settings(
        decoder.model_type,
        decoder.tp_degree,
        amp,
        _positive("batch_size", batch_size),
        buckets,
        min(generation.global_top_k, vocab_size // 8 * 8 or 1),
        neuron_config.output_all_logits,
        vocab_size,
    )
