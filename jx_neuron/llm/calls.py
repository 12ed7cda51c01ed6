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
    """What a model is asked for; `NeuronAutoModelForCausalLM` inherits it."""

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

        logprobs: gives the log-probability of each token by the model itself, and those of this number of the most
                  likely ones; 0 for the token's alone.
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

        texts:  a text or several, which take a tokenizer; or token ids: a row [t], or rows of any lengths, as lists,
                numpy, jax or torch.
        stride: a text longer than n_positions is scored in windows that start `stride` tokens apart, each token with
                the tokens before it in its first window (https://huggingface.co/docs/transformers/perplexity); by
                default half of n_positions.
        adapter: that of `generate`, for all, or one for each text.

        Raises InputError for what is neither, and for ids that the vocabulary does not have.
        """
        rows = self.log_likelihoods(split_prompts(texts)[0], stride=stride, adapter=adapter)
        return [scoring.summary(parts) for parts in rows]

    def log_likelihoods(
        self, rows: Sequence[Any], *, stride: int | None = None, adapter: AdapterNames = None
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
        None forgets them. The kept tokens serve prompts with the same adapter only.
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
    def limits(self) -> Limits:
        """The largest sizes of a call."""
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
