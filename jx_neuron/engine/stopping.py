"""Stopping criteria and detokenization of answers."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from jx_neuron.errors import InputError

CONTEXT = 6  # tokens of the prompt that are decoded with the first ones of an answer
INCOMPLETE = "\ufffd"
UNFINISHED = 3  # most tokens of an incomplete character: UTF-8 has at most four bytes a character


class Detokenizer:
    """Detokenizes one row's answer incrementally, whole characters at a time.

    The texts joined are `decode(prompt + answer)[n:]`, where n counts the characters of the prompt: those of the prompt
    without the tokens (at most three) of an incomplete last character or, where that is more, the common prefix of
    `decode(prompt)` and `decode(prompt + answer)`. So where a prompt ends inside a character, the answer's text begins
    with that character. (Tokenizers with byte fallback decode a run of byte tokens as one. Where later bytes of an
    answer are not UTF-8, decoding would change characters that were yielded before; here only the later bytes are
    replaced.)

    Tokens are decoded with those before them, since spaces depend on these, and their text is the difference:
    https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        first, end = self._whole(prompt)
        self._tokens = list(prompt[first:])
        self._context, self._out = end - first, len(self._decode(prompt[first:end]))
        self._prompt = self._decode(self._tokens)

    def add(self, token: int | None = None, *, last: bool = False) -> str:
        """The text that a token adds; empty while a character is incomplete, except after the last token."""
        if token is not None:
            self._tokens.append(token)
        text = self._decode(self._tokens)
        begin = max(self._out, _alike(self._prompt, text))
        if last or self._is_whole(self._tokens, text):
            end = len(text)
            # a token of no text is left out, but where the text begins: a space there has none by itself
            if end > begin:
                self._tokens = self._tokens[self._context :]
            else:
                self._tokens = self._tokens[: self._context] if self._out else self._tokens[-CONTEXT:]
            self._context = len(self._tokens)
            self._out = len(self._decode(self._tokens))
            self._prompt = ""
        elif len(self._tokens) - self._context > UNFINISHED and begin < len(text):  # not one unfinished character
            rest = len(text) - begin
            self._tokens, self._context, self._prompt = self._tokens[-UNFINISHED - 1 :], 0, ""
            text = self._decode(self._tokens)
            begin, end = max(0, len(text) - rest), len(text) - 1
            self._out = max(begin, end)
        else:
            end = len(text.rstrip(INCOMPLETE))
            self._out = max(self._out, end)
        return text[begin:end]

    def _whole(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The range of the last tokens of a prompt that are whole characters."""
        count = len(prompt)
        for end in range(count, max(0, count - UNFINISHED) - 1, -1):
            for first in (*range(count - CONTEXT, count - CONTEXT - UNFINISHED - 1, -1), 0):
                text = self._decode(tokens := prompt[max(0, first) : end])
                if self._is_whole(tokens, text) and (first <= 0 or (text and not text.startswith(INCOMPLETE))):
                    return max(0, first), end
        return 0, max(0, count - UNFINISHED)

    def _is_whole(self, tokens: Sequence[int], text: str) -> bool:
        """Whether no character is incomplete. The last may be U+FFFD itself, whose three bytes are one character."""
        return not text.endswith(INCOMPLETE) or len(text) < len(self._decode(tokens[:-1]))

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text


def _alike(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class StopStrings:
    """Finds stop strings in an answer, special tokens included."""

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompt: Sequence[int]):
        self._strings, self._longest = strings, max(map(len, strings))
        self._detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=False)
        self._tail = ""

    def ended_by(self, token: int) -> bool:
        """Whether the answer contains a stop string once `token` is added."""
        text = self._tail + self._detokenizer.add(token)
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        return any(string in text for string in self._strings)


class StopFilter:
    """Leaves the stop string out of an answer's text, and holds text back that may begin one."""

    def __init__(self, strings: Sequence[str], include: bool):
        self._strings, self._include, self._held = strings, include, ""

    def add(self, text: str, *, last: bool) -> tuple[str, str | None]:
        """The text that is certain, and the stop string that ends it."""
        text = self._held + text
        matches = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if last and matches:
            at, string = min(matches)
            return text[: at + len(string) if self._include else at], string
        count = 0 if last else held_back(text, self._strings)
        self._held = text[len(text) - count :]
        return text[: len(text) - count], None


def held_back(text: str, strings: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins one of `strings`.

    >>> held_back("one <to", ["<tool>"])
    3
    """
    most = max((len(string) for string in strings), default=0)
    ends = (text[-count:] for count in range(min(most, len(text)), 0, -1))
    return next((len(end) for end in ends if any(string.startswith(end) for string in strings)), 0)


class Criteria:
    """HF's stopping criteria on the ids [n, prompt and answer] so far."""

    def __init__(self, criteria: Any, ids_bt: np.ndarray):
        try:
            import torch
        except ImportError:
            raise InputError("stopping_criteria_list takes torch, which is not installed: pip install torch") from None
        self._criteria = criteria if callable(criteria) else _each(criteria)
        self._torch, self._ids_bt = torch, torch.from_numpy(ids_bt)

    def met(self, token_b: np.ndarray) -> np.ndarray:
        """Whether each row ends with its next token, bool [n]."""
        token_b1 = self._torch.from_numpy(token_b.astype(np.int64))[:, None]
        self._ids_bt = self._torch.cat([self._ids_bt, token_b1], dim=1)
        return np.broadcast_to(np.asarray(self._criteria(self._ids_bt, None), bool), token_b.shape)


def _each(criteria: Any) -> Any:
    def met(ids: Any, scores: Any) -> Any:
        return np.any([np.broadcast_to(np.asarray(one(ids, scores), bool), len(ids)) for one in criteria], axis=0)

    return met
