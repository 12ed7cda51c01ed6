"""`NeuronAutoModelForCausalLM`: made of an origin, an engine, and a client of that engine."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, Unpack, overload

from jx_neuron.config import GenerationConfig, NeuronConfig
from jx_neuron.engine import prompts, scoring
from jx_neuron.engine.answer import Step
from jx_neuron.engine.client import Client
from jx_neuron.engine.defaults import SamplingDefaults
from jx_neuron.engine.drafting import Drafter
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.generation import Generation, Request
from jx_neuron.engine.options import Options
from jx_neuron.engine.scoring import Score
from jx_neuron.engine.ticket import Event
from jx_neuron.errors import ArtifactError, ConfigError, InputError
from jx_neuron.llm import drafts
from jx_neuron.llm.options import CheckpointOptions, LoweringOptions, ModelOptions, accepts, require_saved
from jx_neuron.llm.origin import CheckpointOrigin, ConfigOrigin, ModuleOrigin, Origin
from jx_neuron.runtime import deployment as deploy
from jx_neuron.runtime.base import Runtime
from jx_neuron.runtime.deployment import Deployment
from jx_neuron.runtime.saved import SavedModel
from jx_neuron.step.buckets import Buckets
from jx_neuron.util.arguments import integers
from jx_neuron.util.once import Once

if TYPE_CHECKING:  # running a saved model needs no model code
    from flax import nnx

    from jx_neuron.checkpoint.hf_config import HFConfig
    from jx_neuron.checkpoint.weights import W
    from jx_neuron.engine.options import SamplingParams


AdapterNames = str | Sequence[str | None] | None
"""An adapter by name for all rows, or one for each; None for none."""


class NeuronAutoModelForCausalLM:
    """A decoder of any supported family.

    Made by `from_pretrained` or `from_module`. `to_neuron` reads its weights and readies its programs (the first use
    does, where it was not called); then `sample` and `stream` give tokens, and calling it gives logits. `save` keeps
    what was lowered and compiled.
    """

    MODEL_TYPE: ClassVar[str | None] = None

    def __init__(self, origin: Origin, backend: str, neuron_config: NeuronConfig | None = None):
        self.backend, self.neuron_config = backend, neuron_config or NeuronConfig()
        self._make_of(origin)

    def _make_of(self, origin: Origin) -> None:
        backend, self.settings, self.config = self.backend, origin.settings, dict(origin.config)
        if (batching := self.neuron_config.continuous_batching) is not None:
            batching.require_fit(self.settings.slots, self.settings.buckets.capacity)
        self._origin = origin
        self._deployment = Once(lambda: origin.deployment)
        self._engine = Once(self._start)
        self._plain_tokenizer = Once(lambda: origin.tokenizer(plain=True))
        defaults = SamplingDefaults(
            self.settings.vocab_size,
            None if backend == "xla" else self.settings.candidates,
            self.settings.generation,
            self.neuron_config.on_device_generation,
        )
        self._client = Client(self.settings, self.neuron_config, defaults, self._engine, lambda: self.text_tokenizer)

    def _start(self) -> Engine:
        jobs = self.neuron_config.compilation_worker_count
        runtime = self._origin.runtime(self.backend, self._deployment, jobs)
        return Engine.of_model(runtime, self.settings, self._origin.first_not_finite)

    @classmethod
    @accepts(CheckpointOptions)
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Unpack[CheckpointOptions]
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
        neuron_config:           further options, a `NeuronConfig`.
        backend:                 "xla" runs the model through jax.jit, "host" runs its lowered programs on host
                                 devices, "neuron" runs what neuronx-cc makes of them; by default neuron where there
                                 is one, else xla.
        revision, token, local_files_only, cache_dir: huggingface-hub's, for a hub id.
        adapter:                 a LoRA adapter, a folder of PEFT or a hub id, merged into the weights in float32 before
                                 they are cast or quantized.
        adapters:                LoRA adapters by name, folders of PEFT or hub ids, side by side in every program: each
                                 row names one, or none (docs/adapters.md).
        context_unroll, unroll:  of transformers-neuronx; have no effect: programs for Neuron have every layer.

        Names and shapes of all tensors are checked here; `to_neuron` reads them. A saved model with weights is what it
        was saved for: arguments that ask for another shape are refused.

        Raises CheckpointError, ArtifactError, ConfigError or InputError that says what cannot be had.
        """
        path, backend = pretrained_model_name_or_path, deploy.choose_backend(options["backend"])
        if not deploy.is_artifact(path):
            checkpoint = CheckpointOrigin.open(path, options, backend, cls._check_family)
            return cls(checkpoint, backend, options["neuron_config"])
        if options["backend"] == "xla":
            raise ArtifactError("a saved model holds programs and no model code; its backend is host or neuron")
        if options["adapter"] is not None or options["adapters"]:
            raise ArtifactError("a saved model takes no adapter; save it anew, from its checkpoint with the adapter")
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
        """Takes a decoder with its parameters in hand, such as one just trained, and no checkpoint.

        `module` does as the families' `Model` does; `weights` is its weight table, which says how parameters are split,
        and may be left out at a `tp_degree` of 1. The other arguments are those of `from_pretrained`.
        """
        backend = deploy.choose_backend(options["backend"])
        return cls(ModuleOrigin.of(module, config, weights, options, backend), backend, options["neuron_config"])

    @classmethod
    @accepts(LoweringOptions)
    def from_config(cls, config: Mapping[str, Any], **options: Unpack[LoweringOptions]) -> Self:
        """Takes what a config.json says, and no weights: for `cpu_compile` and `save`, and a later `load` of it.

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
        """Has programs made that verify drafts, of `speculation_length` tokens each, before `to_neuron`; as
        `NeuronConfig(speculation_length=…)` does. The rows are those of the model, `batch_sizes` or None.

        Raises ConfigError where the programs are made already, and for other batch_sizes.
        """
        if batch_sizes is not None and tuple(integers("batch_sizes", batch_sizes)) != self.settings.batch_sizes:
            raise ConfigError(f"batch_sizes={batch_sizes!r}: the model has {self.settings.batch_sizes}; leave it out")
        if self._engine.is_set or self._deployment.is_set:
            raise ConfigError("the programs are made already; call enable_speculative_decoder before to_neuron")
        lengths = NeuronConfig(speculation_length=speculation_length).speculation_length
        self._make_of(drafts.enabled(self._origin, lengths))

    def speculative_forward(
        self, input_ids: Any, cache_ids: Any, start_ids: Any = None, speculation_length: int | None = None
    ) -> Any:
        """Logits of every token of `input_ids` [b, k], which go on from position `cache_ids` of what this thread's last
        call left: float32 [b, k, v]. `speculation_length`, where it is given, is k.

        Raises InputError for tokens that cannot go on there.
        """
        logits_bkv = self._client.speculative_logits(input_ids, cache_ids, start_ids)
        if speculation_length not in (None, logits_bkv.shape[1]):
            raise InputError(f"speculation_length={speculation_length}, and input_ids has {logits_bkv.shape[1]} tokens")
        return logits_bkv

    def to_neuron(self) -> Self:
        """Reads the weights onto the devices and readies the programs.

        With backend "xla", a program is compiled when it is first needed; with "neuron", neuronx-cc compiles those that
        no `load` brought. Raises CompilerError where that cannot be.
        """
        self._engine()
        return self

    def lowered(self) -> Deployment:
        """The programs as they go to neuronx-cc, made when first asked for."""
        return self._deployment()

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
        parameters = self._origin.parameters() if sharded_weights else None
        save_tokenizer = self._origin.save_tokenizer
        return deploy.save(os.fspath(directory), self.lowered(), self.config, parameters, save_tokenizer)

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
        """Writes a checkpoint of what is loaded, for transformers and `from_pretrained`, and returns its folder.

        config.json, generation_config.json, the tokenizer's files, and weights as safetensors: HF's tensors in the
        dtype `amp`, widened where the checkpoint's are quantized. Of a multimodal model it is the text model. The
        folder, new or empty, is whole or absent, whenever the process ends.

        max_shard_size: most bytes of a file of weights, a number or a text such as "5GB".

        Raises ConfigError where the model was loaded with `quant` (`jx-neuron quantize` writes such checkpoints),
        ArtifactError for a folder that is not empty or cannot be written, and for a model that `save` wrote.
        """
        from jx_neuron.llm.saving import save_pretrained

        return save_pretrained(self._origin, directory, max_shard_size)

    def load(self, directory: str | os.PathLike[str]) -> Self:
        """Takes the programs that `save` wrote, so that `to_neuron` need not lower and compile them.

        Raises ArtifactError where they were made for another model, degree, dtype, batch or buckets.
        """
        saved = SavedModel.open(os.fspath(directory))
        differences = saved.settings.differences(self.settings)
        if differences or not self._origin.matches(saved.config):
            what = ", ".join(differences) or "another config"
            raise ArtifactError(f"{directory} was saved for {what}; make the model with the same, or save it anew")
        self._deployment.set(saved.deployment)
        return self

    def __repr__(self) -> str:
        path, settings = self._origin.path, self.settings
        fields: dict[str, Any] = {"path": str(path)} if path else {}
        fields |= dict(model_type=settings.model_type, batch_size=self.batch_size, n_positions=self.buckets.capacity)
        fields |= dict(tp_degree=settings.tp_degree, amp=settings.amp, backend=self.backend)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: it holds compiled programs and memory of devices. "
            "Threads may share it; another process makes its own with from_pretrained"
        )

    def __call__(
        self,
        input_ids: Any,
        cache_ids: Any = None,
        start_ids: Any = None,
        *,
        adapter: AdapterNames = None,
    ) -> Any:
        """Logits after the last token of each row, float32 [b, v]; of every token [b, t, v] with `output_all_logits`.

        input_ids: [b, t] integers, as lists, numpy, jax or torch.
        cache_ids: None for prompts, which empty the cache first; or the position of the first token, or of each, to go
                   on from what this thread's last call left.
        start_ids: [b], the first real position of each left-padded row; where `cache_ids` go on, that of its prompt.
        adapter:   that of `generate`, of prompts.

        With `NeuronConfig(continuous_batching=…)`, start_ids [n] or [n, 1] are the sequences of the rows, and cache_ids
        [n, t] the positions of their tokens, followed by 0 for padding. A sequence begins at position 0, and goes on
        where it ends or before. Rows that go on by several tokens have logits after each, [n, t, v]. A model that has
        on_device_generation gives the tokens drawn, int64 [n, 1]. Torch tensors of ids have torch tensors returned.

        Raises InputError where the compiled model cannot take them, and NonFiniteError for logits that are not finite.
        """
        return self._client.forward(input_ids, cache_ids, start_ids, adapter)

    forward = __call__

    def sample(
        self,
        input_ids: Any,
        sequence_length: int | None = None,
        start_ids: Any = None,
        *,
        streamer: Any = None,
        draft: Any = None,
        adapter: AdapterNames = None,
        **options: Unpack[Options],
    ) -> Any:
        """Continues each row up to `sequence_length` tokens, the prompt counted, or until all rows have ended.

        input_ids:       [b, t] integers, as lists, numpy, jax or torch.
        sequence_length: by default the GenerationConfig's max_length, or else n_positions.
        start_ids:       [b], the first real position of each left-padded row.
        streamer:        an HF streamer; its put() gets the prompt, then the tokens of each step.
        draft, adapter:  those of `generate`.
        options:         those of `jx_neuron.engine.options.Options`: top_k, top_p, temperature, seed and more. What
                         is not given is the GenerationConfig's, or else top_k=50: see "Defaults" in
                         docs/getting-started.md.

        Returns ids [b, up to sequence_length] in the kind that was given, prompt first, in its dtype or, where that
        does not hold the vocabulary, int32 (torch's int64); a row that has ended goes on in the padding token (the end
        token where the checkpoint has none of the vocabulary). Raises InputError before anything runs where the
        compiled model cannot take the call, and NonFiniteError where the logits hold a NaN or an infinity.

        Threads may call at once; they take turns.
        """
        drafter = self.drafter(draft)
        return self._client.sample(input_ids, sequence_length, start_ids, options, streamer, drafter, adapter)

    def stream(
        self,
        input_ids: Any,
        sequence_length: int | None = None,
        start_ids: Any = None,
        *,
        logprobs: int | None = None,
        draft: Any = None,
        adapter: AdapterNames = None,
        **options: Unpack[Options],
    ) -> Iterator[Step]:
        """The answer of `sample` as it is made: for each step the tokens, their text, why rows ended, and when.

        logprobs: gives the log-probability of each token by the model itself, and those of so many of the most likely
                  ones; 0 for the token's alone.
        draft, adapter: those of `generate`.
        """
        drafter = self.drafter(draft)
        return self._client.steps(
            input_ids,
            sequence_length,
            start_ids,
            options,
            logprobs=logprobs,
            text=True,
            drafter=drafter,
            adapter=adapter,
        )

    @overload
    def generate(
        self,
        prompts: Any,
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        *,
        stream: Literal[False] = False,
        draft: Any = None,
        adapter: AdapterNames = None,
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompts: Any,
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        *,
        stream: Literal[True],
        draft: Any = None,
        adapter: AdapterNames = None,
    ) -> Iterator[Event]: ...
    def generate(
        self,
        prompts: Any,
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        *,
        stream: bool = False,
        draft: Any = None,
        adapter: AdapterNames = None,
    ) -> list[Generation] | Iterator[Event]:
        """Answers to any number of prompts of any lengths; as many are under way at a time as batch_size says.

        prompts:  a text or token ids, or a sequence of such; texts take a tokenizer.
        sampling: how answers are chosen and when they end; one for all, or one for each prompt.
        stream:   gives an iterator of events, one for each token, instead of whole answers.
        draft:    what guesses tokens, which the model then verifies several at a time (docs/speculation.md): "ngram"
                  looks them up in prompt and answer; another model of the same tokens, or a
                  `jx_neuron.engine.drafting.Drafter`. The tokens are those without.
        adapter:  the name of one of the model's `adapters`, for all, or one for each prompt; None for none.

        Raises InputError before anything runs for a prompt or a sampling that the model cannot take, and NonFiniteError
        where logits hold a NaN or an infinity.
        """
        drafter = self.drafter(draft)
        if stream:
            return self._client.events(prompts, sampling, drafter, adapter)
        return self._client.generations(prompts, sampling, drafter, adapter)

    def request(
        self,
        prompt: Any,
        sampling: "SamplingParams",
        prompt_logprobs: int | None = None,
        *,
        draft: Any = None,
        adapter: str | None = None,
    ) -> Request:
        """A request for `jx_neuron.serve.AsyncEngine`; the arguments are those of its `submit`, and `draft`.

        Raises InputError where the model cannot take it.
        """
        return self._client.request(prompt, sampling, prompt_logprobs, self.drafter(draft), adapter)

    def drafter(self, draft: Any) -> Drafter | None:
        """The drafter that the `draft` of `generate` names. Raises InputError or ConfigError where it cannot be one."""
        return drafts.drafter_of(draft, self)

    def score(self, texts: Any, *, stride: int | None = None, adapter: AdapterNames = None) -> list[Score]:
        """Log-likelihood and perplexity of each text, or of each row of token ids.

        texts:  a text or several, which take a tokenizer; or token ids: a row [t], or rows of any lengths, as lists,
                numpy, jax or torch.
        stride: a text longer than n_positions is scored in windows that start so many tokens apart, each token with
                what its first window holds before it (https://huggingface.co/docs/transformers/perplexity); by default
                half of n_positions.
        adapter: that of `generate`, for all, or one for each text.

        Raises InputError for what is neither, and for ids that the vocabulary does not have.
        """
        rows = self.log_likelihoods(prompts.several(texts), stride=stride, adapter=adapter)
        return [scoring.summary(parts) for parts in rows]

    def log_likelihoods(
        self,
        rows: Sequence[Any],
        *,
        stride: int | None = None,
        adapter: AdapterNames = None,
    ) -> list[scoring.Parts]:
        """What each row's tokens are worth one by one, given those before them: log-probability, and whether likeliest.

        rows: texts, or token ids [t], a row each. `stride` and `adapter` are those of `score`.

        Raises InputError where programs were compiled without output_all_logits, and for ids that there are not.
        """
        return self._client.log_likelihoods(rows, stride, adapter)

    def keep_prefix(self, input_ids: Any, *, adapter: str | None = None) -> None:
        """Computes tokens [t] or [1, t] once and keeps them: prompts that all start with them go on from there.

        What such prompts give is what they would give without. On backend "xla" they have a slot of their own; on the
        others, whose tables have one for each row of a batch, they are computed again after prompts that take all, and
        with recurrent layers after each prompt that takes their slot: its state cannot go back to them.
        None forgets them. They serve prompts of one adapter, or of none.
        """
        self._client.keep_prefix(input_ids, adapter)

    def update_generation_config(self, generation_config: GenerationConfig) -> None:
        """Has `sample` choose tokens so where it is not told otherwise, from now on. Nothing is compiled.

        The model takes a copy: what is assigned to `generation_config` later takes another call.

        Raises ConfigError where the model was made with one that is not dynamic, and for an end token that the
        vocabulary does not have.
        """
        self._client.defaults = self._client.defaults.updated(generation_config)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's own copy of the GenerationConfig it was made with, or last updated to; None without one."""
        return self._client.defaults.generation_config

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row, by the GenerationConfig, else generation_config.json, else config.json.

        Ids that the vocabulary does not have, such as -1, are left out.
        """
        return self._client.defaults.eos_token_ids

    @property
    def hf_generation_config(self) -> dict[str, Any] | None:
        """What generation_config.json says, None without one; of a saved model, its end and padding tokens."""
        return self._origin.generation_config

    @property
    def batch_size(self) -> int:
        """Most rows of a call; where prompts are given several answers, of the answers."""
        return self.settings.slots

    @property
    def most_prompts(self) -> int:
        """How many prompts a call takes."""
        return self.limits.batch

    @property
    def copies(self) -> int:
        """How many answers each prompt is given."""
        return self._client.copies

    @property
    def limits(self) -> prompts.Limits:
        """What a call may hold."""
        return self._client.limits

    @property
    def buckets(self) -> Buckets:
        """The lengths that programs are compiled for."""
        return self.settings.buckets

    @property
    def engine(self) -> Engine:
        """What runs the programs, and whose turn it is."""
        return self._engine()

    @property
    def runtime(self) -> Runtime:
        """What runs the programs."""
        return self.engine.runtime

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, an HF one. Raises InputError where the model came without."""
        return self._origin.tokenizer()

    @property
    def text_tokenizer(self) -> Any:
        """What makes tokens of texts and texts of tokens: `tokenizer` once it is loaded, for it may be changed; before,
        one that gives the same and loads faster. Raises InputError where the model came without."""
        return self.tokenizer if "tokenizer" in vars(self) else self._plain_tokenizer()
