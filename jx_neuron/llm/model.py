"""`NeuronAutoModelForCausalLM`: made of an origin, an engine, and a client of that engine."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, Unpack

from jx_neuron import distributed
from jx_neuron.config import NeuronConfig
from jx_neuron.engine.client import Client
from jx_neuron.engine.defaults import SamplingDefaults
from jx_neuron.engine.engine import Engine
from jx_neuron.errors import ArtifactError, ConfigError
from jx_neuron.llm import drafts
from jx_neuron.llm.calls import Calls
from jx_neuron.llm.options import CheckpointOptions, LoweringOptions, ModelOptions, accepts, require_saved
from jx_neuron.llm.origin import CheckpointOrigin, ConfigOrigin, ModuleOrigin, Origin
from jx_neuron.llm.training import Trainable
from jx_neuron.runtime import deployment as deploy
from jx_neuron.runtime.deployment import Deployment
from jx_neuron.runtime.saved import SavedModel
from jx_neuron.util.arguments import integers
from jx_neuron.util.once import Once
from jx_neuron.util.pages import count_text

if TYPE_CHECKING:  # running a saved model needs no model code
    from flax import nnx

    from jx_neuron.checkpoint.hf_config import HFConfig
    from jx_neuron.checkpoint.weights import W


class NeuronAutoModelForCausalLM(Calls, Trainable):
    """A decoder of any supported family.

    `from_pretrained` opens a checkpoint. `generate` answers texts, messages or token ids. `sample` and `stream` are the
    calls of transformers-neuronx. A call of the model returns logits. `to_neuron` reads the weights and prepares the
    programs; otherwise the first call does. `save` writes lowered or compiled programs.
    """

    MODEL_TYPE: ClassVar[str | None] = None

    def __init__(self, origin: Origin, backend: str, neuron_config: NeuronConfig | None = None):
        self.backend, self.neuron_config = backend, neuron_config or NeuronConfig()
        self._make_of(origin)

    def _make_of(self, origin: Origin) -> None:
        backend, self.settings, self.config = self.backend, origin.settings, dict(origin.config)
        if (batching := self.neuron_config.continuous_batching) is not None:
            batching.require_fit(self.settings.slots, self.settings.buckets.capacity)
        self._origin, self._heads = origin, {}
        self._deployment = Once(lambda: origin.deployment)
        self._engine = Once(self._start)
        self._plain_tokenizer = Once(lambda: origin.tokenizer(plain=True))
        defaults = SamplingDefaults(
            self.settings.vocab_size,
            None if backend == "xla" else self.settings.candidates,
            self.settings.generation,
            self.neuron_config.on_device_generation,
        )
        self._client = Client(
            self.settings,
            self.neuron_config,
            defaults,
            self._engine,
            lambda: self.text_tokenizer,
            lambda: self.tokenizer,
        )

    def _start(self) -> Engine:
        jobs = self.neuron_config.compilation_worker_count
        own = distributed.ranks(self.backend, self.settings.tp_degree)
        runtime = self._origin.runtime(self.backend, self._deployment, jobs, own)
        runtime = distributed.shared(runtime, self.settings, self.config)
        return Engine.of_model(runtime, self.settings, self._origin.first_not_finite)

    @classmethod
    @accepts(CheckpointOptions)
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Unpack[CheckpointOptions]
    ) -> Self:
        """Opens a checkpoint: a folder, a file of weights, or a Hugging Face hub id; or a folder that `save` wrote.

        batch_size:              largest number of rows of a call, or a list of batch buckets; fewer rows are padded.
        prompt_batch_size:       largest number of prompts of a call. Each prompt gets batch_size / prompt_batch_size
                                 answers; it is computed once, and its keys and values are copied. Divides batch_size.
        n_positions:             longest sequence, prompt and answer together, or a list of token buckets; by default
                                 2048, or the trained positions if they are fewer.
        tp_degree:               number of cores that share the model.
        amp:                     dtype of weights and cache: f32, f16 or bf16.
        dtype:                   the same under HF's name: "float32", "float16" or "bfloat16", or a dtype of numpy, jax
                                 or torch.
        context_length_estimate: longest prompt that is computed in one piece, or a list of context buckets.
        neuron_config:           further options, a `NeuronConfig`.
        backend:                 "xla" runs the model through jax.jit, "host" runs its lowered programs on host
                                 devices, "neuron" runs them compiled by neuronx-cc; by default neuron if there is a
                                 device, else xla.
        revision, token, local_files_only, cache_dir: huggingface-hub's, for a hub id.
        adapter:                 a LoRA adapter, a folder of PEFT or a hub id, merged into the weights in float32 before
                                 they are cast or quantized.
        adapters:                LoRA adapters by name, folders of PEFT or hub ids, side by side in every program: each
                                 row names one, or none (docs/adapters.md).
        context_unroll, unroll:  of transformers-neuronx; have no effect: programs for Neuron have every layer.

        Names and shapes of all tensors are checked here; `to_neuron` reads them. A saved model has the shape that it
        was saved for: other arguments are refused.

        Raises CheckpointError, ArtifactError, ConfigError or InputError that says what is wrong and what is legal.
        """
        path, backend = pretrained_model_name_or_path, deploy.choose_backend(options["backend"])
        if not deploy.is_artifact(path):
            checkpoint = CheckpointOrigin.open(path, options, backend, cls._check_family)
            return cls(checkpoint, backend, options["neuron_config"])
        if options["backend"] == "xla":
            raise ArtifactError("a saved model holds programs and no model code; its backend is host or neuron")
        if options["adapter"] is not None or options["adapters"]:
            raise ArtifactError("a saved model takes no adapter; save it again, from its checkpoint with the adapter")
        saved = SavedModel.open(os.fspath(path))
        require_saved(options, saved.settings)
        cls._check_family(saved.settings.model_type)
        saved.require_complete()
        return cls(saved, "host" if backend == "xla" else backend, options["neuron_config"])

    @classmethod
    @accepts(ModelOptions)
    def from_module(
        cls,
        module: "nnx.Module",
        config: "HFConfig",
        *,
        weights: "Sequence[W]" = (),
        **options: Unpack[ModelOptions],
    ) -> Self:
        """Takes a decoder module with its parameters, such as one just trained, and no checkpoint.

        `module` does as the families' `Model` does; `weights` is its weight table, which says how parameters are split,
        and may be left out at a `tp_degree` of 1. The other arguments are those of `from_pretrained`.
        """
        backend = deploy.choose_backend(options["backend"])
        return cls(ModuleOrigin.of(module, config, weights, options, backend), backend, options["neuron_config"])

    @classmethod
    @accepts(LoweringOptions)
    def from_config(cls, config: Mapping[str, Any], **options: Unpack[LoweringOptions]) -> Self:
        """Makes a model of a config.json, without weights: for `cpu_compile`, `save` and a later `load`.

        The arguments are those of `from_pretrained`.
        """
        from jx_neuron.models import text_config

        config = text_config(config)
        cls._check_family(config.get("model_type"))
        return cls(ConfigOrigin.of(config, options), "host", options["neuron_config"])

    @classmethod
    def _check_family(cls, model_type: Any) -> None:
        if cls.MODEL_TYPE not in (None, model_type):
            raise ConfigError(
                f"{cls.__name__} takes models of model_type {cls.MODEL_TYPE!r} and this one is of {model_type!r}; "
                "NeuronAutoModelForCausalLM takes any"
            )

    def enable_speculative_decoder(self, speculation_length: int | Sequence[int], batch_sizes: Any = None) -> None:
        """Adds programs that verify drafts of `speculation_length` tokens, like `NeuronConfig(speculation_length=…)`.

        Call it before `to_neuron`. `batch_sizes` is that of the model, or None. Raises ConfigError if the programs are
        made already, and for other batch_sizes.
        """
        if batch_sizes is not None and tuple(integers("batch_sizes", batch_sizes)) != self.settings.batch_sizes:
            raise ConfigError(f"batch_sizes={batch_sizes!r}: the model has {self.settings.batch_sizes}; leave it out")
        if self._engine.is_set or self._deployment.is_set:
            raise ConfigError("the programs are made already; call enable_speculative_decoder before to_neuron")
        lengths = NeuronConfig(speculation_length=speculation_length).speculation_length
        self._make_of(drafts.enabled(self._origin, lengths))

    def to_neuron(self) -> Self:
        """Reads the weights onto the devices and prepares the programs.

        With backend "xla", a program is compiled when it is first needed. With "neuron", neuronx-cc compiles the
        programs that `load` did not read. Raises CompilerError if it fails.
        """
        self._engine()
        return self

    def lowered(self) -> Deployment:
        """The programs as neuronx-cc gets them, lowered at the first call."""
        return self._deployment()

    def cpu_compile(self, target: str | None = None) -> Self:
        """Lowers, checks and compiles for Neuron without a device, so that `save` can follow.

        target: inf2, trn1, trn1n, trn2 or trn3; by default that of NEURON_CC_FLAGS, then this machine's, then trn1.

        Raises LoweringError for programs that the target cannot run, and CompilerError without neuronx-cc. `save`
        without `cpu_compile` needs no compiler, and writes the lowered programs.
        """
        self.lowered().compile(target, self.neuron_config.compilation_worker_count)
        return self

    def save(
        self, directory: str | os.PathLike[str], *, sharded_weights: bool = False, ranks_per_host: int | None = None
    ) -> Path:
        """Writes lowered or compiled programs, the tokenizer, and with `sharded_weights` each core's weights.

        ranks_per_host: how many of the cores each host has, where several hosts share the model; then it runs on
                        NeuronCores on that number of hosts and no other. None for any number (docs/several-hosts.md).

        The folder is written completely or not at all. With weights, `from_pretrained(directory)` runs it. Without
        weights, a model made from the checkpoint calls `load(directory)`, and compiles nothing.
        """
        parameters = self._origin.parameters() if sharded_weights else None
        save_tokenizer = self._origin.save_tokenizer
        return deploy.save(
            os.fspath(directory), self.lowered(), self.config, parameters, save_tokenizer, ranks_per_host
        )

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
        """Writes a checkpoint of the loaded model, for transformers and `from_pretrained`, and returns its folder.

        The folder has config.json, generation_config.json, the tokenizer's files, and safetensors: HF's tensors in the
        dtype `amp`, widened if the checkpoint's are quantized. For a multimodal model, the text model is written. The
        folder must be new or empty. It is complete or absent, even if the process is killed.

        max_shard_size: largest size of a file of weights, a number of bytes or a text such as "5GB".

        Raises ConfigError where the model was loaded with `quant` (`jx-neuron quantize` writes such checkpoints),
        ArtifactError for a folder that is not empty or cannot be written, and for a model that `save` wrote.
        """
        from jx_neuron.llm.saving import save_pretrained

        return save_pretrained(self._origin, directory, max_shard_size)

    def load(self, directory: str | os.PathLike[str]) -> Self:
        """Reads the programs that `save` wrote, so that `to_neuron` does not lower and compile them.

        Raises ArtifactError if they were made for another model, degree, dtype, batch or buckets.
        """
        saved = SavedModel.open(os.fspath(directory))
        differences = saved.settings.differences(self.settings)
        if differences or not self._origin.matches(saved.config):
            what = ", ".join(differences) or "another config"
            raise ArtifactError(f"{directory} was saved for {what}; make the model with the same, or save it again")
        self._deployment.set(saved.deployment)
        return self

    def __repr__(self) -> str:
        path, settings = self._origin.path, self.settings
        fields: dict[str, Any] = {"path": str(path)} if path else {}
        fields["model_type"] = settings.model_type
        if (count := self._origin.parameter_count) is not None:
            fields["parameters"] = count_text(count)
        fields |= dict(batch_size=self.batch_size, n_positions=self.buckets.capacity)
        fields |= dict(tp_degree=settings.tp_degree, amp=settings.amp, backend=self.backend)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: it holds compiled programs and memory of devices. "
            "Threads may share it; another process makes its own with from_pretrained"
        )
