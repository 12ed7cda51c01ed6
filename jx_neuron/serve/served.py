"""A model as a server has it: its names, its tokens, and how requests' fields become sampling parameters."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from jx_neuron.engine.grammar import Grammar, Grammars
from jx_neuron.engine.options import SamplingParams
from jx_neuron.errors import InputError, JxNeuronError
from jx_neuron.serve.async_engine import AsyncEngine
from jx_neuron.serve.constraints import Constraints
from jx_neuron.serve.errors import APIError, invalid
from jx_neuron.serve.metrics import Metrics
from jx_neuron.serve.protocol import Sampling
from jx_neuron.serve.settings import ServerSettings
from jx_neuron.serve.token_sizes import TokenSizes, token_sizes

if TYPE_CHECKING:
    from jx_neuron.llm.model import NeuronAutoModelForCausalLM

INLINE = 4096  # characters that take less time to tokenize than a thread to answer
CONTEXT = "context_length_exceeded"


class Served:
    """A model that a server answers with.

    draining: whether the server ends, and takes no more requests.
    """

    def __init__(self, model: "NeuronAutoModelForCausalLM", engine: AsyncEngine, settings: ServerSettings):
        self.model, self.engine, self.settings = model, engine, settings
        if both := sorted({*settings.names} & {*self.adapters}):
            raise InputError(f"{both[0]!r} is the name of the model, and of an adapter; name either otherwise")
        self.created = int(time.time())
        self.capacity, self.vocab_size = model.buckets.capacity, model.settings.vocab_size
        self.metrics = Metrics(engine, settings, dict(model_max_len=self.capacity, slots=model.batch_size))
        self.draining = False
        self._defaults = model.hf_generation_config or {}
        self.token_text = lru_cache(maxsize=self.vocab_size)(self._token_text)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.settings.names[0]

    @property
    def adapters(self) -> Sequence[str]:
        """The names of the model's adapters, which requests name as models."""
        adapters = self.model.settings.adapters
        return adapters.names if adapters else ()

    def named(self, name: str | None) -> str:
        """The name in answers to a request of model `name`."""
        return name if name in self.adapters and name is not None else self.name

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request of model `name` is answered by; None for the model alone."""
        return name if name in self.adapters else None

    def require_name(self, name: str | None) -> None:
        """Raises APIError where a request names another model."""
        if name is not None and name not in (names := [*self.settings.names, *self.adapters]):
            message = f"there is no model {name!r}; this server has {', '.join(names)}"
            raise APIError(404, message, param="model", code="model_not_found")

    # ---- text and tokens

    @cached_property
    def tokenizer(self) -> Any:
        """HF's tokenizer. Raises APIError where the model has none."""
        try:
            return self.model.tokenizer
        except JxNeuronError as error:
            raise invalid(f"this model has no tokenizer; give prompts as token ids ({error})") from error

    def load_tokenizer(self) -> None:
        """Loads the tokenizer where the model has one. It imports transformers, which takes seconds."""
        with suppress(APIError):
            _ = self.tokenizer

    @cached_property
    def grammars(self) -> Grammars:
        """What makes grammars."""
        return Grammars(self.tokenizer, self.vocab_size, self.model.eos_token_ids)

    @cached_property
    def _sizes(self) -> TokenSizes | None:
        return token_sizes(self.tokenizer)

    async def encode(self, text: str, special: bool = True, *, any_length: bool = False) -> list[int]:
        """The tokens of a text; with special tokens of the tokenizer's own where `special`.

        any_length: otherwise APIError is raised for a text that is too long for the model whatever its tokens are,
                    without making them: 10 MB take half a minute.
        """

        def run() -> list[int]:
            try:
                encoded = text.encode()
            except UnicodeEncodeError as error:
                raise invalid(f"a text is not Unicode: {error.reason}") from None
            if len(text) > INLINE and not any_length and self._sizes is not None:
                least = self._sizes.fewest(encoded)
                if least > self.capacity:
                    raise invalid(
                        f"this model's maximum context length is {self.capacity} tokens; a text has at least {least}. "
                        "Shorten it",
                        code=CONTEXT,
                    )
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

        return run() if len(text) <= INLINE else await asyncio.to_thread(run)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens. Raises APIError for ids outside the vocabulary."""
        if wrong := next((id for id in ids if not 0 <= id < self.vocab_size), None):
            raise invalid(f"token {wrong} is none of the vocabulary; ids are 0 to {self.vocab_size - 1}", "tokens")
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _token_text(self, id: int) -> str:
        return self.decode([id])

    # ---- sampling

    def room(self, prompt: Sequence[int], wanted: int | None) -> int:
        """The most tokens of an answer. Raises APIError where prompt and answer are longer than the model takes."""
        room = self.capacity - len(prompt)
        if room < max(1, wanted or 0):
            answer = "" if wanted is None else f" and {wanted} of the answer make {len(prompt) + wanted}"
            raise invalid(
                f"this model's maximum context length is {self.capacity} tokens; {len(prompt)} of the prompt{answer}. "
                "Shorten either",
                code=CONTEXT,
            )
        return room if wanted is None else max(wanted, 1)

    def require_length(self, items: Any, name: str) -> None:
        """Raises APIError for a list of more items than a sequence has tokens. It takes no time, where checking each
        item of a long list takes seconds."""
        if isinstance(items, list) and len(items) > self.capacity:
            raise invalid(
                f"{name} has {len(items)} items, and this model's maximum context length is {self.capacity} tokens. "
                "Shorten it",
                name,
                CONTEXT,
            )

    def truncated(self, prompt: list[int], most: int | None) -> list[int]:
        """The last `most` tokens of a prompt; -1 for as many as the model takes."""
        if most is None:
            return prompt
        return prompt[-(self.capacity - 1 if most == -1 else most) :] if most else []

    def sampling(
        self, request: Sampling, *, max_tokens: int, logprobs: int | None, grammar: Grammar | None = None
    ) -> SamplingParams:
        """The sampling parameters of a request. What it lacks is as in generation_config.json, or else as at OpenAI:
        temperature 1 and the whole vocabulary."""
        compiled = None if self.model.backend == "xla" else self.model.settings.candidates

        def default(name: str, neutral: Any) -> Any:
            value = getattr(request, name)
            value = self._defaults.get(name) if value is None else value
            return neutral if value is None else value

        endless = request.ignore_eos and grammar is None
        ends = [] if endless else list(self.model.eos_token_ids)
        ends += [id for id in request.stop_token_ids or () if id not in ends]
        top_k = default("top_k", compiled or 0)
        return SamplingParams(
            max_tokens=max_tokens,
            n=request.n or 1,
            temperature=default("temperature", 1.0),
            top_k=max(top_k, 0),
            top_p=default("top_p", 1.0),
            top_p_min_tokens=request.top_p_min_tokens,
            min_p=default("min_p", None),
            seed=None if request.seed is None else request.seed % 2**64,
            repetition_penalty=default("repetition_penalty", None),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            no_repeat_ngram_size=request.no_repeat_ngram_size,
            logit_bias=_bias(request.logit_bias),
            stop=stops(request) or None,
            eos_token_id=ends or -1,
            logprobs=logprobs,
            grammar=self._constraints(request, ends, grammar),
        )

    def _constraints(self, request: Sampling, ends: Sequence[int], grammar: Grammar | None) -> Constraints | None:
        allowed = None
        if request.allowed_token_ids:
            allowed = np.zeros(self.vocab_size, bool)
            if not all(0 <= id < self.vocab_size for id in request.allowed_token_ids):
                raise invalid(f"allowed_token_ids are 0 to {self.vocab_size - 1}", "allowed_token_ids")
            allowed[request.allowed_token_ids] = True
        bad_words = [
            ids
            for word in request.bad_words or ()
            for text in (word, " " + word.lstrip())
            if (ids := self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ]
        min_tokens = request.min_tokens or 0
        if grammar is None and allowed is None and not bad_words and not min_tokens:
            return None
        return Constraints(grammar, allowed, ends, min_tokens, bad_words)

    def require_count(self, prompts: int, n: int | None) -> None:
        """Raises APIError for more answers than a request may have."""
        if (count := prompts * (n or 1)) > self.settings.most_answers:
            most = self.settings.most_answers
            raise invalid(f"{prompts} prompts × n = {count} answers; a request may have {most}", "n")

    def require_logprobs(self, name: str, count: int | None) -> int | None:
        """Returns `count`. Raises APIError for more log-probabilities than a token may have."""
        if count is not None and count > (most := self.settings.most_logprobs):
            raise invalid(f"{name}={count} is not legal; it is at most {most}", name)
        return count


def stops(request: Sampling) -> list[str]:
    """The stop strings of a request."""
    return [request.stop] if isinstance(request.stop, str) else list(request.stop or ())


def _bias(fields: dict[str, Any] | None) -> dict[int, float] | None:
    try:
        return {int(id): float(value) for id, value in fields.items()} if fields else None
    except (TypeError, ValueError):
        raise invalid("logit_bias maps token ids to numbers", "logit_bias") from None
