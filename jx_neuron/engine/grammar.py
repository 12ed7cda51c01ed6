"""Grammars of answers: a JSON schema or a regular expression, as a mask of the tokens that may follow.

https://github.com/guidance-ai/llguidance
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from jx_neuron.checkpoint.tokenizer import PlainTokenizer
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import shown

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# blanks between JSON tokens are limited, for a small model may write nothing else without end
_OPTIONS = {"whitespace_pattern": r"[ \n]{1,32}", "lenient": False}


class Grammar:
    """The tokens that may follow in one answer.

    vocab_size: the number of logits; tokens that the tokenizer lacks are never permitted.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def done(self) -> bool:
        """Whether only an end token may follow."""
        return self._matcher.is_stopped()

    def mask_logits(self, logits_v: np.ndarray) -> np.ndarray:
        """Logits float32 [v], -inf for tokens that may not follow.

        Raises InputError where none may that has a logit above -inf, and for a grammar too complex to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        permitted_v = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
        masked_v = np.where(permitted_v, logits_v, np.float32(-np.inf))
        if np.isneginf(masked_v).all():
            raise InputError(
                "the grammar permits no token here that is not banned (logit_bias), or that this tokenizer has; "
                "leave out the bans, or change the grammar"
            )
        return masked_v

    def accept(self, token: int) -> None:
        """Takes the next token of the answer. Raises InputError for one that may not follow."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Self:
        """A copy in the same state, which goes on alone."""
        return type(self)(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot go on: {self._matcher.get_error()}; make it simpler")


class Grammars:
    """Makes the grammars of a model.

    tokenizer:  HF's fast tokenizer, or a `PlainTokenizer`: of bytes (GPT-2, Llama 3), or
                with tokens for bytes (SentencePiece).
    vocab_size: the number of the model's logits, which may exceed the tokenizer's vocabulary.
    eos_ids:    the tokens that end an answer.

    Raises InputError for another tokenizer, and where llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]):
        try:
            import llguidance
        except ImportError:
            raise InputError("grammars take llguidance, which is not installed: pip install llguidance") from None
        if not eos_ids:
            raise InputError("grammars take a model with an end token; give one as eos_token_id in a GenerationConfig")
        self._llguidance, self._vocab_size, self._eos_ids = llguidance, vocab_size, list(eos_ids)
        plain = isinstance(tokenizer, PlainTokenizer)
        self._backend: Any = tokenizer.backend if plain else getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise InputError(f"grammars take a fast tokenizer, and this is a {type(tokenizer).__name__}")

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        settings = json.loads(self._backend.to_str()) | {"truncation": None, "padding": None}
        size = max(self._vocab_size, self._backend.get_vocab_size())
        try:
            return self._llguidance.LLTokenizer(json.dumps(settings), n_vocab=size, eos_token=self._eos_ids)
        except ValueError as error:
            raise InputError(
                f"grammars take a tokenizer of bytes, or with tokens for bytes, and this one is neither: {error}"
            ) from error

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that is valid by `schema`. Raises InputError that names a keyword that is malformed or unsupported."""
        if not isinstance(schema, Mapping):
            raise InputError(f"a JSON schema is a mapping, such as {{'type': 'object'}}; this is {shown(schema)}")
        return self._grammar("JSON schema", lambda: self._of_schema(schema))

    def regex(self, pattern: str) -> Grammar:
        """Text that matches `pattern` as a whole, in Rust's syntax without look-around. Raises InputError."""
        if not isinstance(pattern, str):
            raise InputError(f"a regular expression is a text; this is {shown(pattern)}")
        return self._grammar("regular expression", lambda: self._llguidance.LLMatcher.grammar_from_regex(pattern))

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def _of_schema(self, schema: Mapping[str, Any]) -> str:
        text = json.dumps(schema, allow_nan=False)
        return self._llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)  # type: ignore[arg-type]

    def _grammar(self, what: str, source: Callable[[], str]) -> Grammar:
        try:
            matcher = self._llguidance.LLMatcher(self._tokenizer, source(), log_level=0)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the {what} cannot be read: {error}") from error
        if problem := matcher.get_error():
            raise InputError(f"the {what} is not supported: {problem.strip()}")
        return Grammar(matcher, self._vocab_size)
