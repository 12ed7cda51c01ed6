"""The calls of a model: tokens, texts, logits and scores."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from jx_neuron.config import GenerationConfig
from jx_neuron.engine import scoring
from jx_neuron.engine.answer import Step
from jx_neuron.engine.drafting import Drafter
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.generation import Generation, Request
from jx_neuron.engine.keywords import SamplingKeywords, Samplings, samplings_of
from jx_neuron.engine.options import Options
from jx_neuron.engine.prompts import Limits, split_prompts
from jx_neuron.engine.scoring import Score
from jx_neuron.engine.ticket import Event
from jx_neuron.errors import InputError
from jx_neuron.llm import drafts
from jx_neuron.runtime.base import Runtime
from jx_neuron.step.buckets import Buckets

if TYPE_CHECKING:
    from jx_neuron.artifact.settings import Settings
    from jx_neuron.engine.client import Client
    from jx_neuron.engine.eagle import EagleDrafter
    from jx_neuron.engine.options import SamplingParams
    from jx_neuron.llm.origin import Origin
    from jx_neuron.util.once import Once

AdapterNames = str | Sequence[str | None] | None
"""An adapter by name for all rows, or one for each; None for none."""


class Calls:
    """The calls of a model. `NeuronAutoModelForCausalLM` inherits them."""

    settings: "Settings"
    backend: str
    _origin: "Origin"
    _heads: "dict[str, EagleDrafter]"
    _engine: "Once[Engine]"
    _client: "Client"
    _plain_tokenizer: "Once[Any]"

    def __call__(
        self, input_ids: Any, cache_ids: Any = None, start_ids: Any = None, *, adapter: AdapterNames = None
    ) -> Any:
        """Logits after the last token of each row, float32 [b, v]; of every token [b, t, v] with `output_all_logits`.

        input_ids: [b, t] integers, as lists, numpy, jax or torch.
        cache_ids: None for prompts, which empty the cache first. Or the position of the first token, or of each token,
                   to continue from this thread's last call.
        start_ids: [b], the first real position of each left-padded row. With `cache_ids`, that of its prompt.
        adapter:   that of `generate`, for prompts.

        With `NeuronConfig(continuous_batching=…)`, start_ids [n] or [n, 1] are the sequences of the rows, and cache_ids
        [n, t] the positions of their tokens, followed by 0 for padding. A sequence begins at position 0, and continues
        at its end or before. Rows that continue by several tokens have logits after each token, [n, t, v]. A model with
        on_device_generation returns the sampled tokens, int64 [n, 1]. For ids in torch, tensors of torch are returned.

        Raises InputError for a call that the compiled model does not support, and NonFiniteError for logits that are
        not finite.
        """
        return self._client.forward(input_ids, cache_ids, start_ids, adapter)

    forward = __call__

    def speculative_forward(
        self, input_ids: Any, cache_ids: Any, start_ids: Any = None, speculation_length: int | None = None
    ) -> Any:
        """Logits of every token of `input_ids` [b, k], which continue this thread's last call at position `cache_ids`:
        float32 [b, k, v]. `speculation_length` is k, or None.

        Raises InputError for tokens that cannot continue there.
        """
        logits_bkv = self._client.speculative_logits(input_ids, cache_ids, start_ids)
        if speculation_length not in (None, logits_bkv.shape[1]):
            raise InputError(f"speculation_length={speculation_length}, and input_ids has {logits_bkv.shape[1]} tokens")
        return logits_bkv

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
        """Yields the answer of `sample` step by step: the tokens, their text, why rows ended, and the time.

        logprobs: adds the log-probability of each token, and of this number of the most likely tokens; 0 for the
                  token only.
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
        sampling: Samplings = None,
        *,
        stream: Literal[True],
        draft: Any = None,
        adapter: AdapterNames = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Iterator[Event]: ...
    @overload
    def generate(
        self,
        prompts: str,
        sampling: Samplings = None,
        *,
        stream: Literal[False] = False,
        draft: Any = None,
        adapter: AdapterNames = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        sampling: Samplings = None,
        *,
        stream: Literal[False] = False,
        draft: Any = None,
        adapter: AdapterNames = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompts: Any,
        sampling: Samplings = None,
        *,
        stream: Literal[False] = False,
        draft: Any = None,
        adapter: AdapterNames = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Any: ...
    def generate(
        self,
        prompts: Any,
        sampling: Samplings = None,
        *,
        stream: bool = False,
        draft: Any = None,
        adapter: AdapterNames = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Generation | list[Generation] | Iterator[Event]:
        """Answers one prompt or any number of prompts of any lengths; `batch_size` answers run at a time.

        prompts:  a text, a row of token ids, or a conversation: a list of messages {"role": …, "content": …}, which the
                  tokenizer's chat template writes. Or a list of such. Texts and messages need a tokenizer.
        sampling: a `SamplingParams` for all prompts, or a list with one for each prompt; greedy by default.
        stream:   True returns an iterator of events, one for each token, instead of whole answers.
        draft:    guesses tokens, which the model then verifies several at a time (docs/speculation.md): "ngram" looks
                  them up in prompt and answer; or another model with the same tokens, or a
                  `jx_neuron.engine.drafting.Drafter`; or the folder or hub id of an EAGLE-3 head of the model. The
                  answers are the same as without a draft.
        adapter:  the name of one of the model's `adapters`, for all, or one for each prompt; None for none.
        keywords: fields of `SamplingParams`, which replace those of `sampling`; or HF's names for them:
                  max_new_tokens, do_sample, num_return_sequences, stop_strings.

        Returns a `Generation` for one prompt, and a list of them for a list of prompts.

        Raises InputError before anything runs for a prompt or a sampling that the model cannot take, TypeError for an
        unknown keyword, and NonFiniteError where logits hold a NaN or an infinity.
        """
        rows, is_one = split_prompts(prompts)
        samplings, drafter = samplings_of(sampling, keywords, len(rows)), self.drafter(draft)
        if stream:
            return self._client.events(rows, samplings, drafter, adapter)
        generations = self._client.generations(rows, samplings, drafter, adapter)
        return generations[0] if is_one else generations

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

        texts:  a text or several, which need a tokenizer. Or token ids: a row [t], or rows of any lengths, as lists,
                numpy, jax or torch.
        stride: a text longer than n_positions is scored in windows that start `stride` tokens apart, each token with
                the tokens before it in its first window (https://huggingface.co/docs/transformers/perplexity); by
                default half of n_positions.
        adapter: that of `generate`, for all, or one for each text.

        Raises InputError for anything else, and for ids that are not in the vocabulary.
        """
        rows = self.log_likelihoods(split_prompts(texts)[0], stride=stride, adapter=adapter)
        return [scoring.summary(parts) for parts in rows]

    def log_likelihoods(
        self, rows: Sequence[Any], *, stride: int | None = None, adapter: AdapterNames = None
    ) -> list[scoring.Parts]:
        """For each token of each row, its log-probability after the tokens before it, and whether it is the likeliest.

        rows: texts, or token ids [t], a row each. `stride` and `adapter` are those of `score`.

        Raises InputError if programs were compiled without output_all_logits, and for ids that are not in the
        vocabulary.
        """
        return self._client.log_likelihoods(rows, stride, adapter)

    def keep_prefix(self, input_ids: Any, *, adapter: str | None = None) -> None:
        """Computes tokens [t] or [1, t] once, and keeps their keys and values for prompts that begin with them.

        Answers do not change. On backend "xla" the prefix has a slot of its own. On the other backends it shares the
        slots of the batch, and is computed again after prompts that used every slot. With recurrent layers it is
        computed again after each prompt that used its slot, because their state cannot be cropped.
        None removes the prefix. It is used for prompts with the same adapter only.
        """
        self._client.keep_prefix(input_ids, adapter)

    def update_generation_config(self, generation_config: GenerationConfig) -> None:
        """Replaces the defaults of `sample` and `stream`. Nothing is compiled.

        The model has a copy: call this again after a later change of `generation_config`.

        Raises ConfigError if the model was made with a config that is not dynamic, and for an end token that is not in
        the vocabulary.
        """
        self._client.defaults = self._client.defaults.updated(generation_config)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's copy of the GenerationConfig that it was made with, or was last updated to; None without one."""
        return self._client.defaults.generation_config

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row: from the GenerationConfig, else generation_config.json, else config.json.

        Ids that are not in the vocabulary, such as -1, are left out.
        """
        return self._client.defaults.eos_token_ids

    @property
    def hf_generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json, or None; for a saved model, its end and padding tokens."""
        return self._origin.generation_config

    @property
    def batch_size(self) -> int:
        """The largest number of rows of a call; with `prompt_batch_size`, of answers."""
        return self.settings.slots

    @property
    def most_prompts(self) -> int:
        """The largest number of prompts of a call."""
        return self.limits.batch

    @property
    def copies(self) -> int:
        """The number of answers to each prompt."""
        return self._client.copies

    @property
    def limits(self) -> Limits:
        """The largest sizes of a call."""
        return self._client.limits

    @property
    def buckets(self) -> Buckets:
        """The lengths that programs are compiled for."""
        return self.settings.buckets

    @property
    def engine(self) -> Engine:
        """The engine, which plans and runs the turns of all callers."""
        return self._engine()

    @property
    def runtime(self) -> Runtime:
        """The runtime, which runs the programs."""
        return self.engine.runtime

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of HF transformers. Raises InputError if the checkpoint has none."""
        return self._origin.tokenizer()

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer in use: `tokenizer` once it is loaded, since it may be changed; before, one that gives the same
        results and loads faster. Raises InputError if the checkpoint has none."""
        return self.tokenizer if "tokenizer" in vars(self) else self._plain_tokenizer()
