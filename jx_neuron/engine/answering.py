"""What a model can be asked for: tokens, logits and scores."""

import copy
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal, Unpack, overload

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.checkpoint.folder import Checkpoint
from jx_neuron.config import GenerationConfig, NeuronConfig
from jx_neuron.engine import generation, prompts, scoring
from jx_neuron.engine.answer import Step, steps
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.generation import Generation
from jx_neuron.engine.options import Choice, Options, SamplingParams, check_names, choices, criteria_of, pad_of
from jx_neuron.engine.rows import Rows
from jx_neuron.engine.scoring import Score
from jx_neuron.engine.stopping import Criteria, Detokenizer
from jx_neuron.engine.ticket import Event, Ticket
from jx_neuron.errors import ConfigError, InputError, JxNeuronError
from jx_neuron.step.buckets import MOST_ROWS, Buckets
from jx_neuron.util.arguments import integer, integers, plain, shown


class Answering:
    """A model whose programs run on an engine; `NeuronAutoModelForCausalLM` makes it."""

    settings: Settings
    backend: str
    _last: threading.local
    neuron_config: NeuronConfig
    generation_config: GenerationConfig | None
    _checkpoint: Checkpoint | None

    @property
    def engine(self) -> Engine:
        """What runs the programs, and whose turn it is."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, an HF one. Raises InputError where the model came without."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """Most rows of a call; where prompts are given several answers, of the answers."""
        return self.settings.batch_sizes[-1]

    @property
    def buckets(self) -> Buckets:
        """The lengths that programs are compiled for."""
        return self.settings.buckets

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row, by the GenerationConfig, else generation_config.json, else config.json.

        Ids that the vocabulary does not have, such as -1, are left out.
        """
        of_config = self.generation_config.eos_token_id if self.generation_config else None
        given = self.settings.generation.get("eos_token_id") if of_config is None else of_config
        ids = () if given is None else np.atleast_1d(given).tolist()
        return tuple(id for id in ids if 0 <= id < self.settings.vocab_size)

    @property
    def hf_generation_config(self) -> dict[str, Any] | None:
        """What generation_config.json says, None without one; of a saved model, its end and padding tokens."""
        if self._checkpoint is not None:
            return self._checkpoint.generation_config
        return {key: value for key, value in self.settings.generation.items() if value is not None} or None

    def __call__(self, input_ids: Any, cache_ids: Any = None, start_ids: Any = None) -> np.ndarray:
        """Logits after the last token of each row, float32 [b, v]; of every token [b, t, v] with `output_all_logits`.

        input_ids: [b, t] integers, as lists, numpy, jax or torch.
        cache_ids: None for prompts, which empty the cache first; or the position of the first token, or of each, to go
                   on from what this thread's last call left.
        start_ids: [b], the first real position of each left-padded row; where `cache_ids` go on, that of its prompt.

        Raises InputError where the compiled model cannot take them, and NonFiniteError for logits that are not finite.
        """
        ids_bt = prompts.batch_of(input_ids, self.limits)
        all_logits = self.neuron_config.output_all_logits
        if cache_ids is None:
            self._forget_last()
            self._last.rows = Rows(self.engine, self._rows(ids_bt, start_ids))
            return self._last.rows.logits(all_logits)
        start_b = prompts.starts(cache_ids, start_ids, ids_bt.shape, self.limits)
        rows: Rows | None = getattr(self._last, "rows", None)
        if rows is None:
            raise InputError(
                "cache_ids go on from the last call of the model in this thread, and there was none since it last "
                "sampled or scored; begin with the whole prompt, without cache_ids"
            )
        rows.seek(start_b)
        logits_btv = rows.extend(ids_bt, all_logits)
        return logits_btv if all_logits else logits_btv[:, 0]

    def sample(
        self,
        input_ids: Any,
        sequence_length: int | None = None,
        start_ids: Any = None,
        *,
        streamer: Any = None,
        **options: Unpack[Options],
    ) -> Any:
        """Continues each row up to `sequence_length` tokens, the prompt counted, or until all rows have ended.

        input_ids:       [b, t] integers, as lists, numpy, jax or torch.
        sequence_length: by default the GenerationConfig's max_length, or else n_positions.
        start_ids:       [b], the first real position of each left-padded row.
        streamer:        an HF streamer; its put() gets the prompt, then the tokens of each step.
        options:         those of `jx_neuron.engine.options.Options`: top_k, top_p, temperature, seed and more. What
                         is not given is the GenerationConfig's, or else top_k=50: see "Defaults" in
                         docs/getting-started.md.

        Returns ids [b, up to sequence_length] in the kind that was given, prompt first, in its dtype or, where that
        does not hold the vocabulary, int32 (torch's int64); a row that has ended goes on in the padding token (the end
        token where the checkpoint has none of the vocabulary). Raises InputError before anything runs where the
        compiled model cannot take the call, and NonFiniteError where the logits hold a NaN or an infinity.

        Threads may call at once; they take turns.
        """
        ids_bt = prompts.batch_of(input_ids, self.limits)
        restore = prompts.restore_as(input_ids, self.limits.vocab_size)
        answers = self._steps(ids_bt, sequence_length, start_ids, options)
        tokens = [np.repeat(ids_bt, self.copies, axis=0)]
        shown = np.asarray if isinstance(input_ids, list | tuple) else restore
        try:
            if streamer is not None:
                streamer.put(shown(tokens[0]))
            for step in answers:
                tokens.append(step.tokens[:, None])
                if streamer is not None:
                    streamer.put(shown(tokens[-1])[:, 0])
        finally:
            if isinstance(answers, Generator):
                answers.close()
            if streamer is not None:
                streamer.end()
        return restore(np.concatenate(tokens, axis=1))

    def stream(
        self,
        input_ids: Any,
        sequence_length: int | None = None,
        start_ids: Any = None,
        *,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Step]:
        """The answer of `sample` as it is made: for each step the tokens, their text, why rows ended, and when.

        logprobs: gives the log-probability of each token by the model itself, and those of so many of the most likely
                  ones; 0 for the token's alone.
        """
        ids_bt = prompts.batch_of(input_ids, self.limits)
        return self._steps(ids_bt, sequence_length, start_ids, options, logprobs=logprobs, text=True)

    @overload
    def generate(
        self,
        prompts: Any,
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        *,
        stream: Literal[False] = False,
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompts: Any,
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        *,
        stream: Literal[True],
    ) -> Iterator[Event]: ...
    def generate(
        self,
        prompts: Any,
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        *,
        stream: bool = False,
    ) -> list[Generation] | Iterator[Event]:
        """Answers to any number of prompts of any lengths; as many are under way at a time as batch_size says.

        prompts:  a text or token ids, or a sequence of such; texts take a tokenizer.
        sampling: how answers are chosen and when they end; one for all, or one for each prompt.
        stream:   gives an iterator of events, one for each token, instead of whole answers.

        Raises InputError before anything runs for a prompt or a sampling that the model cannot take, and NonFiniteError
        where logits hold a NaN or an infinity.
        """
        rows = [self._prompt(prompt, number) for number, prompt in enumerate(_several(prompts))]
        samplings = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(rows)
        if len(samplings) != len(rows) or not all(isinstance(one, SamplingParams) for one in samplings):
            raise InputError(f"sampling takes a SamplingParams, or {len(rows)}, one for each prompt")
        wishes = [self._wishes(row, one) for row, one in zip(rows, samplings, strict=True)]
        tokenizer = self.tokenizer if any(wish[0].stop_strings for wish in wishes) else self._tokenizer_if_any()
        self._forget_last()
        events = generation.events(self.engine, rows, wishes, tokenizer)
        return events if stream else generation.whole(rows, [len(wish) for wish in wishes], events)

    def _prompt(self, prompt: Any, number: int) -> list[int]:
        name = f"prompt {number}"
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        row: list[int] = prompts.row_of(ids, self.limits, name).tolist()
        if len(row) >= self.buckets.capacity:
            raise InputError(
                f"{name} has {len(row)} tokens and leaves no room for an answer in n_positions="
                f"{self.buckets.capacity}; shorten it, or make the model with a larger n_positions"
            )
        return row

    def _wishes(self, prompt: Sequence[int], sampling: SamplingParams) -> list[Choice]:
        room = self.buckets.capacity - len(prompt)
        most = room if sampling.max_tokens is None else min(room, integer("max_tokens", sampling.max_tokens))
        return choices(
            sampling.options,
            self.generation_config or GenerationConfig(),
            integer("n", sampling.n, most=MOST_ROWS),
            most,
            vocab_size=self.settings.vocab_size,
            compiled=None if self.backend == "xla" else self.settings.candidates,
            eos=self.eos_token_ids,
            logprobs=sampling.logprobs,
        )

    def score(self, texts: Any, *, stride: int | None = None) -> list[Score]:
        """Log-likelihood and perplexity of each text, or of each row of token ids.

        texts:  a text or several, which take a tokenizer; or token ids: a row [t], or rows of any lengths, as lists,
                numpy, jax or torch.
        stride: a text longer than n_positions is scored in windows that start so many tokens apart, each token with
                what its first window holds before it (https://huggingface.co/docs/transformers/perplexity); by default
                half of n_positions.

        Raises InputError for what is neither, and for ids that the vocabulary does not have.
        """
        rows = [self.tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in _several(texts)]
        return [scoring.summary(parts) for parts in self.log_likelihoods(rows, stride=stride)]

    def keep_prefix(self, input_ids: Any) -> None:
        """Computes tokens [t] or [1, t] once and keeps them: prompts that all start with them go on from there.

        What such prompts give is what they would give without. On backend "xla" they have a slot of their own; on the
        others, whose tables have one for each row of a batch, they are computed again after prompts that take all.
        None forgets them.
        """
        if input_ids is None:
            self.engine.keep_prefix(None)
            return
        row = prompts.row_of(input_ids, self.limits)
        prompts.batch_of(row[None], self.limits)
        self._forget_last()
        self.engine.keep_prefix(row.tolist())

    def update_generation_config(self, generation_config: GenerationConfig) -> None:
        """Has `sample` choose tokens so where it is not told otherwise, from now on. Nothing is compiled.

        The model takes a copy: what is assigned to `generation_config` later takes another call.

        Raises ConfigError where the model was made with one that is not dynamic, and for an end token that the
        vocabulary does not have.
        """
        if not isinstance(generation_config, GenerationConfig):
            raise ConfigError(f"it takes a jx_neuron.GenerationConfig, and this is {shown(generation_config)}")
        if self.generation_config is not None and not self.generation_config.dynamic:
            raise ConfigError(
                "the model was made with a GenerationConfig that is not dynamic; "
                "make it with on_device_generation=GenerationConfig(dynamic=True, …) to change it later"
            )
        self.generation_config = self._own(generation_config)

    def _own(self, config: GenerationConfig) -> GenerationConfig:
        if config.eos_token_id is not None:
            most = self.settings.vocab_size - 1
            integers("eos_token_id", config.eos_token_id, least=-1, most=most, error=ConfigError)
        return copy.copy(config)

    @property
    def most_prompts(self) -> int:
        """How many prompts a call takes."""
        return self.settings.prompt_batch or self.batch_size

    @property
    def limits(self) -> prompts.Limits:
        """What a call may hold."""
        return prompts.Limits(self.most_prompts, self.settings.vocab_size, self.buckets.capacity)

    @property
    def copies(self) -> int:
        """How many answers each prompt is given."""
        return self.batch_size // self.most_prompts

    def _steps(
        self,
        ids_bt: np.ndarray,
        sequence_length: int | None,
        start_ids: Any,
        options: Options,
        *,
        logprobs: int | None = None,
        text: bool = False,
    ) -> Iterator[Step]:
        check_names(options)
        if sequence_length is None:
            told = self.generation_config.max_length if self.generation_config else None
            sequence_length = self.buckets.capacity if told is None else told
        length = prompts.length_of(sequence_length, ids_bt.shape[1], self.limits)
        rows = self._rows(ids_bt, start_ids, options.get("attention_mask"))
        copies, fallback = self.copies, self.generation_config or GenerationConfig(do_sample=True)
        wishes = choices(
            options,
            fallback,
            len(rows) * copies,
            length - ids_bt.shape[1],
            vocab_size=self.settings.vocab_size,
            compiled=None if self.backend == "xla" else self.settings.candidates,
            eos=self.eos_token_ids,
            logprobs=logprobs,
        )
        criteria = criteria_of(options.get("stopping_criteria_list"))
        criteria = Criteria(criteria, np.repeat(ids_bt, copies, axis=0)) if criteria else None
        tokenizer = self.tokenizer if wishes[0].stop_strings else self._tokenizer_if_any() if text else None
        self._forget_last()
        pad = pad_of(self.settings.generation.get("pad_token_id"), wishes[0].eos, self.settings.vocab_size)

        def run() -> Iterator[Step]:
            tickets: list[Ticket] = []
            texts: list[Detokenizer] = []
            for row in map(np.ndarray.tolist, rows):
                first = len(tickets)
                tickets += self.engine.submit(row, wishes[first : first + copies], first, tokenizer)
                if text and tokenizer is not None:
                    texts += [Detokenizer(tokenizer, row, skip_special_tokens=True) for _ in range(copies)]
            yield from steps(tickets, pad, texts, criteria, logprobs)

        return run() if length > ids_bt.shape[1] else iter(())

    def log_likelihoods(self, rows: Sequence[Any], *, stride: int | None = None) -> list[scoring.Parts]:
        """What each row's tokens are worth one by one, given those before them: log-probability, and whether likeliest.

        rows: token ids [t] each. The `stride` is that of `score`.

        Raises InputError where programs were compiled without output_all_logits, and for ids that there are not.
        """
        if self.backend != "xla" and not self.settings.all_logits:
            raise InputError(
                "scores take the logits of every token, and the programs give the last one's; "
                "make the model with neuron_config=NeuronConfig(output_all_logits=True)"
            )
        tokens = [prompts.row_of(row, self.limits, f"row {number}") for number, row in enumerate(rows)]
        stride = scoring.stride_of(stride, self.buckets.capacity)
        self._forget_last()
        return scoring.log_likelihoods(self.engine, tokens, stride)

    def _forget_last(self) -> None:
        """Gives back the slots of this thread's last call of the model."""
        rows: Rows | None = getattr(self._last, "rows", None)
        if rows is not None:
            rows.close()
        self._last.rows = None

    def _tokenizer_if_any(self) -> Any:
        try:
            return self.tokenizer
        except JxNeuronError:
            return None

    def _rows(self, ids_bt: np.ndarray, start_ids: Any, attention_mask: Any = None) -> list[np.ndarray]:
        return prompts.rows_of(ids_bt, start_ids, attention_mask, padding_side=self.neuron_config.padding_side)


def _several(prompts: Any) -> list[Any]:
    """Texts or rows of token ids, where `prompts` may be one of them."""
    several = plain(prompts)
    if not isinstance(several, Iterable) or isinstance(several, str | bytes | Mapping | Set):
        return [prompts]
    several = list(several)
    return [several] if several and not isinstance(plain(several[0]), Iterable) else several
