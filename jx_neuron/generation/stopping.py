"""When a row has ended, and the text that its tokens make."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jx_neuron.errors import InputError

CONTEXT = 6  # tokens of the prompt that the first ones of an answer are decoded with
INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one row's answer as it grows, whole characters at a time.

    Tokens are decoded with those before them, as spaces depend on them, and the difference is what they add:
    https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens = list(prompt[-CONTEXT:])
        self._first, self._read = 0, len(self._tokens)

    def add(self, token: int | None = None, *, last: bool = False) -> str:
        """What a token adds to the text; nothing while a character is incomplete, except at the last."""
        if token is not None:
            self._tokens.append(token)
        before = self._decode(self._tokens[self._first : self._read])
        text = self._decode(self._tokens[self._first :])
        if len(text) <= len(before) or (text.endswith(INCOMPLETE) and not last):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Finds texts in each row's answer, special tokens among it."""

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompts: Sequence[Sequence[int]]):
        self._strings, self._longest = strings, max(map(len, strings))
        self._rows = [Detokenizer(tokenizer, prompt, skip_special_tokens=False) for prompt in prompts]
        self._tails = [""] * len(prompts)

    def found(self, token_b: np.ndarray) -> np.ndarray:
        """Whether each row's next token makes its answer hold one, bool [n]."""
        held_b = np.zeros(len(token_b), bool)
        for row, token in enumerate(token_b.tolist()):
            text = self._tails[row] + self._rows[row].add(token)
            held_b[row] = any(string in text for string in self._strings)
            self._tails[row] = text[max(0, len(text) - self._longest + 1) :]
        return held_b


class Criteria:
    """HF's stopping criteria on the ids so far [n, prompt and answer]."""

    def __init__(self, criteria: Any, ids_bt: np.ndarray):
        try:
            import torch
        except ImportError:
            raise InputError("stopping_criteria_list takes torch, which is not installed: pip install torch") from None
        self._criteria = criteria if callable(criteria) else _each(criteria)
        self._torch, self._ids_bt = torch, torch.from_numpy(ids_bt)

    def met(self, token_b: np.ndarray) -> np.ndarray:
        """Whether each row is to end with its next token, bool [n]."""
        token_b1 = self._torch.from_numpy(token_b.astype(np.int64))[:, None]
        self._ids_bt = self._torch.cat([self._ids_bt, token_b1], dim=1)
        return np.broadcast_to(np.asarray(self._criteria(self._ids_bt, None), bool), token_b.shape)


def _each(criteria: Any) -> Any:
    def met(ids: Any, scores: Any) -> Any:
        return np.any([np.broadcast_to(np.asarray(one(ids, scores), bool), len(ids)) for one in criteria], axis=0)

    return met
