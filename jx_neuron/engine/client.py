"""The calls of a model: they check arguments and submit requests to the engine."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jx_neuron.artifact.settings import Settings
from jx_neuron.config import NeuronConfig
from jx_neuron.engine import generation, prompts, scoring
from jx_neuron.engine.answer import Step, steps
from jx_neuron.engine.defaults import SamplingDefaults
from jx_neuron.engine.drafting import Drafter
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.generation import Generation, Request
from jx_neuron.engine.numbered import NumberedSequences, pieces_of
from jx_neuron.engine.options import Choice, Options, SamplingParams, check_names, criteria_of
from jx_neuron.engine.rows import LastRows
from jx_neuron.engine.stopping import Criteria, Detokenizer
from jx_neuron.engine.ticket import Event, Ticket
from jx_neuron.errors import InputError, JxNeuronError
from jx_neuron.step.buckets import MOST_ROWS
from jx_neuron.util.arguments import integer, per_row, shown


@dataclass
class Client:
    """Checks the arguments of a model's calls, and has an engine compute them.

    settings:  the settings of the model.
    defaults:  sampling options that a call does not give.
    engine:    returns the engine; called once the arguments are checked.
    tokenizer: returns the tokenizer. Raises a JxNeuronError where there is none.
    last:      the rows of a thread's last call.
    numbered:  the sequences of calls with continuous batching.
    """

    settings: Settings
    neuron_config: NeuronConfig
    defaults: SamplingDefaults
    engine: Callable[[], Engine]
    tokenizer: Callable[[], Any]
    last: LastRows = field(default_factory=LastRows)
    numbered: NumberedSequences = field(default_factory=NumberedSequences)

    @property
    def limits(self) -> prompts.Limits:
        """The limits of a call."""
        return prompts.Limits(self.settings.most_prompts, self.settings.vocab_size, self.settings.buckets.capacity)

    @property
    def copies(self) -> int:
        """The number of answers to each prompt."""
        return self.settings.slots // self.limits.batch

    def adapter_numbers(self, adapter: Any, rows: int) -> list[int]:
        """The number of each row's adapter, by the name of one for all, or of one for each; 0 for None.

        Raises InputError for an adapter that the model does not have.
        """
        names = self.settings.adapters.names if self.settings.adapters else ()

        def number(name: str, one: Any) -> int:
            if one is None:
                return 0
            if not isinstance(one, str) or one not in names:
                legal = ", ".join(map(repr, names)) or "none; make it with adapters={name: folder}"
                raise InputError(f"{name}={shown(one)} is no adapter of this model; it has {legal}")
            return 1 + names.index(one)

        return per_row("adapter", adapter, rows, number)

    def forward(self, input_ids: Any, cache_ids: Any, start_ids: Any, adapter: Any = None) -> Any:
        """Logits of prompts, or of tokens that continue a thread's last call, or numbered sequences."""
        ids_bt = prompts.batch_of(input_ids, self.limits)
        numbered = self.neuron_config.continuous_batching is not None and start_ids is not None
        if adapter is not None and (numbered or cache_ids is not None):
            raise InputError("adapter goes with prompts alone: what goes on keeps that of its prompt; leave it out")
        if numbered:
            return prompts.like(input_ids, self._of_numbered(ids_bt, cache_ids, start_ids))
        every = self.neuron_config.output_all_logits
        if cache_ids is None:
            self.last.close()
            rows, adapters = self._rows(ids_bt, start_ids), self.adapter_numbers(adapter, len(ids_bt))
            return self.last.begin(self.engine(), rows, adapters).logits(every)
        start_b = prompts.starts(cache_ids, start_ids, ids_bt.shape, self.limits)
        logits_btv = self.last.at(start_b).extend(ids_bt, every)
        return logits_btv if every else logits_btv[:, 0]

    def speculative_logits(self, input_ids: Any, cache_ids: Any, start_ids: Any) -> np.ndarray:
        """Logits of every one of a few tokens that continue a thread's last call; a model's `speculative_forward`."""
        ids_bt = prompts.batch_of(input_ids, self.limits)
        start_b = prompts.starts(cache_ids, start_ids, ids_bt.shape, self.limits)
        return self.last.at(start_b).extend(ids_bt, every=True)

    def _of_numbered(self, ids_nt: np.ndarray, cache_ids: Any, start_ids: Any) -> np.ndarray:
        """Logits [n, v] after each row, or [n, t, v] after each token of rows that go on by several; with a
        GenerationConfig, tokens drawn after each row, [n, 1]."""
        batching = self.neuron_config.continuous_batching
        count = (batching and batching.max_num_seqs) or self.settings.slots
        pieces = pieces_of(ids_nt, cache_ids, start_ids, count, self.limits.capacity)
        several = any(piece.start and len(piece.tokens) > 1 for piece in pieces)
        if self.neuron_config.on_device_generation is None:
            if every := several or self.neuron_config.output_all_logits:
                self._require_all_logits("several tokens of a sequence that goes on")
            return self.numbered.logits(self.engine(), pieces, every)
        if several:
            raise InputError(
                "a sequence goes on by one token where on_device_generation draws the next; make the model without it "
                "for the logits of several"
            )
        choices = self.defaults.choices({}, count, 1, samples=True)
        return self.numbered.draw(self.engine(), pieces, [choices[piece.number].draw for piece in pieces])

    def sample(
        self,
        input_ids: Any,
        sequence_length: int | None,
        start_ids: Any,
        options: Options,
        streamer: Any,
        drafter: Drafter | None = None,
        adapter: Any = None,
    ) -> Any:
        """Prompts and answers, as the type of `input_ids`."""
        ids_bt = prompts.batch_of(input_ids, self.limits)
        restore = prompts.restore_as(input_ids, self.settings.vocab_size)
        streamed = np.asarray if isinstance(input_ids, list | tuple) else restore
        answers = self.steps(ids_bt, sequence_length, start_ids, options, drafter=drafter, adapter=adapter)
        parts = [np.repeat(ids_bt, self.copies, axis=0)]
        try:
            with closing(answers):
                if streamer is not None:
                    streamer.put(streamed(parts[0]))
                for step in answers:
                    parts.append(step.tokens[:, None])
                    if streamer is not None:
                        streamer.put(streamed(parts[-1])[:, 0])
        finally:
            if streamer is not None:
                streamer.end()
        return restore(np.concatenate(parts, axis=1))

    def steps(
        self,
        input_ids: Any,
        sequence_length: int | None,
        start_ids: Any,
        options: Options,
        *,
        logprobs: int | None = None,
        text: bool = False,
        drafter: Drafter | None = None,
        adapter: Any = None,
    ) -> Generator[Step, None, None]:
        """Yields the answers to a batch of prompts step by step; nothing runs before the first `next`."""
        ids_bt = prompts.batch_of(input_ids, self.limits)
        check_names(options)
        if sequence_length is None:
            sequence_length = self.defaults.max_length
        length = prompts.length_of(
            self.limits.capacity if sequence_length is None else sequence_length, ids_bt.shape[1], self.limits
        )
        rows = self._rows(ids_bt, start_ids, options.get("attention_mask"))
        adapters = self.adapter_numbers(adapter, len(rows))
        copies, room = self.copies, length - ids_bt.shape[1]
        choices = self.defaults.choices(options, len(rows) * copies, room, samples=True, logprobs=logprobs)
        criteria = criteria_of(options.get("stopping_criteria_list"))
        criteria = Criteria(criteria, np.repeat(ids_bt, copies, axis=0)) if criteria else None
        tokenizer = self._tokenizer_for(choices, text)
        pad = self.defaults.pad_token_id(choices[0])
        self.last.close()

        def run() -> Generator[Step, None, None]:
            tickets: list[Ticket] = []
            texts: list[Detokenizer] = []
            for row, number in zip(map(np.ndarray.tolist, rows), adapters, strict=True) if room else ():
                first = len(tickets)
                answers = choices[first : first + copies]
                tickets += self.engine().submit(row, answers, first, tokenizer, drafter=drafter, adapter=number)
                if text and tokenizer is not None:
                    texts += [Detokenizer(tokenizer, row, skip_special_tokens=True) for _ in range(copies)]
            yield from steps(tickets, pad, texts, criteria, logprobs)

        return run()

    def events(
        self, several: Any, sampling: Any, drafter: Drafter | None = None, adapter: Any = None
    ) -> Iterator[Event]:
        """Yields every token of the answers to any number of prompts as it is drawn."""
        return self._generation(several, sampling, drafter, adapter)[1]

    def generations(
        self, several: Any, sampling: Any, drafter: Drafter | None = None, adapter: Any = None
    ) -> list[Generation]:
        """The whole answers to any number of prompts."""
        requests, events = self._generation(several, sampling, drafter, adapter)
        return generation.whole(requests, events)

    def request(
        self,
        prompt: Any,
        sampling: SamplingParams,
        prompt_logprobs: int | None = None,
        drafter: Drafter | None = None,
        adapter: Any = None,
    ) -> Request:
        """A request for answers to one prompt.

        prompt_logprobs: gives the log-probability of each token of the prompt, and those of so many of the most likely
                         ones; None for none.

        Raises InputError where the model cannot take it.
        """
        tokens = self._prompt(prompt, 0)
        if prompt_logprobs is not None:
            integer("prompt_logprobs", prompt_logprobs, least=0, most=self.settings.vocab_size)
            self._require_all_logits("prompt_logprobs")
        choices, (number,) = self._choices(tokens, sampling), self.adapter_numbers(adapter, 1)
        return Request(tokens, choices, self._tokenizer_for(choices, text=True), prompt_logprobs, drafter, number)

    def _generation(
        self, several: Any, sampling: Any, drafter: Drafter | None, adapter: Any
    ) -> tuple[list[Request], Iterator[Event]]:
        rows = [self._prompt(prompt, number) for number, prompt in enumerate(prompts.several(several))]
        samplings = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(rows)
        if len(samplings) != len(rows) or not all(isinstance(params, SamplingParams) for params in samplings):
            raise InputError(f"sampling takes a SamplingParams, or {len(rows)}, one for each prompt")
        choices = [self._choices(row, params) for row, params in zip(rows, samplings, strict=True)]
        tokenizer = self._tokenizer_for([answers[0] for answers in choices], text=True)
        requests = [
            Request(row, answers, tokenizer, drafter=drafter, adapter=number)
            for row, answers, number in zip(rows, choices, self.adapter_numbers(adapter, len(rows)), strict=True)
        ]
        self.last.close()
        return requests, generation.events(self.engine(), requests)

    def _prompt(self, prompt: Any, number: int) -> list[int]:
        name, capacity = f"prompt {number}", self.limits.capacity
        row: list[int] = self._row(prompt, name).tolist()
        if len(row) >= capacity:
            raise InputError(
                f"{name} has {len(row)} tokens and leaves no room for an answer in n_positions="
                f"{capacity}; shorten it, or make the model with a larger n_positions"
            )
        return row

    def _row(self, prompt: Any, name: str) -> np.ndarray:
        ids = self.tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return prompts.row_of(ids, self.limits, name)

    def _choices(self, prompt: Sequence[int], sampling: SamplingParams) -> Sequence[Choice]:
        """A Choice for each answer to a prompt."""
        room = self.limits.capacity - len(prompt)
        steps = room if sampling.max_tokens is None else min(room, integer("max_tokens", sampling.max_tokens))
        answers = integer("n", sampling.n, most=MOST_ROWS)
        return self.defaults.choices(
            sampling.options, answers, steps, samples=False, logprobs=sampling.logprobs, grammar=sampling.grammar
        )

    def log_likelihoods(self, rows: Sequence[Any], stride: int | None, adapter: Any = None) -> list[scoring.Parts]:
        """The log-probability of each token of each row, given those before it."""
        self._require_all_logits("scores")
        tokens = [self._row(row, f"row {number}") for number, row in enumerate(rows)]
        stride, adapters = scoring.stride_of(stride, self.limits.capacity), self.adapter_numbers(adapter, len(rows))
        self.last.close()
        return scoring.log_likelihoods(self.engine(), tokens, stride, adapters)

    def _require_all_logits(self, what: str) -> None:
        if self.defaults.candidates is not None and not self.settings.all_logits:
            raise InputError(
                f"{what} take the logits of every token, and the programs give the last one's; "
                "make the model with neuron_config=NeuronConfig(output_all_logits=True)"
            )

    def keep_prefix(self, input_ids: Any, adapter: Any = None) -> None:
        """Computes one row of tokens and keeps it as a prefix of an adapter; None drops the kept prefix."""
        if input_ids is None:
            self.engine().keep_prefix(None)
            return
        row = prompts.row_of(input_ids, self.limits)
        prompts.batch_of(row[None], self.limits)
        (number,) = self.adapter_numbers(adapter, 1)
        self.last.close()
        self.engine().keep_prefix(row.tolist(), number)

    def _tokenizer_for(self, choices: Sequence[Choice], text: bool) -> Any:
        """The tokenizer where stop strings need it, or where `text` is true and there is one; else None."""
        if any(choice.stop_strings for choice in choices):
            return self.tokenizer()
        if not text:
            return None
        try:
            return self.tokenizer()
        except JxNeuronError:
            return None

    def _rows(self, ids_bt: np.ndarray, start_ids: Any, attention_mask: Any = None) -> list[np.ndarray]:
        if self.neuron_config.continuous_batching is not None and start_ids is not None:
            raise InputError(
                "start_ids are sequences where the model has continuous_batching, and an answer needs none; give "
                "attention_mask for padded prompts"
            )
        return prompts.rows_of(ids_bt, start_ids, attention_mask, padding_side=self.neuron_config.padding_side)
