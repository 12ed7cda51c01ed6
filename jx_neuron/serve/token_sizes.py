"""The fewest tokens that a text can have, which a tokenizer need not be run to know."""

import json
from dataclasses import dataclass
from itertools import count
from typing import Any

COMPOSED = 3
"""How many times as long the UTF-8 of a text may be before NFC: https://www.unicode.org/faq/normalization.html"""


@dataclass(frozen=True)
class TokenSizes:
    """The sizes of a byte-level tokenizer's tokens.

    longest: the most bytes of a text that one token stands for.
    missing: bytes that no token has, which are left out of texts.
    """

    longest: int
    missing: bytes

    def fewest(self, text: bytes) -> int:
        """The fewest tokens of a text, given in UTF-8."""
        return -(-len(text.translate(None, self.missing)) // self.longest)


def token_sizes(tokenizer: Any) -> TokenSizes | None:
    """The sizes of a tokenizer's tokens; None where it is no byte-level BPE, or may leave out a part of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    normalizers = {step["type"] for step in _steps(state["normalizer"], "normalizers")}
    added = state["added_tokens"]
    if (
        state["model"]["type"] != "BPE"
        or not normalizers <= {"NFC"}
        or not {"ByteLevel"} <= {step["type"] for step in steps} <= {"ByteLevel", "Split", "Digits"}
        or any(step.get("behavior") == "Removed" for step in steps)
        or any(token["lstrip"] or token["rstrip"] for token in added)  # which take any number of spaces
    ):
        return None
    vocabulary = state["model"]["vocab"]
    longest = max(*map(len, vocabulary), *(len(token["content"].encode()) for token in added), 1)
    missing = bytes(byte for byte, letter in enumerate(_letters()) if letter not in vocabulary)
    return TokenSizes(longest * (COMPOSED if normalizers else 1), missing)


def _letters() -> list[str]:
    """The character that stands for each byte: https://github.com/openai/gpt-2/blob/master/src/encoder.py"""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _steps(part: Any, several: str) -> list[Any]:
    """The parts of a pipeline, in order."""
    if part is None:
        return []
    return [step for one in part[several] for step in _steps(one, several)] if part["type"] == "Sequence" else [part]
