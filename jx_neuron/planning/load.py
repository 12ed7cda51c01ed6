"""The load of a server: when requests arrive, and how many tokens prompts and answers have."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integer, integers, real

Lengths = int | tuple[int, int]
"""Tokens: as many each time, or any number from the first to the second, all as likely."""

MOST_TOKENS = 2**24
WORDS = 2**31
"""Tokens that prompts of a simulation are drawn from: no two prompts begin alike by chance."""


@dataclass(frozen=True)
class Arrival:
    """A request: the seconds at which it arrives, the tokens of its prompt, and how many its answer has."""

    at: float
    prompt: Sequence[int]
    answer: int


@dataclass(frozen=True)
class Load:
    """Requests that arrive independently of each other, a Poisson process, and their lengths.

    rate:   requests/s.
    prompt: tokens of prompts.
    answer: tokens of answers.
    shared: tokens of a prefix that all prompts have before those.
    pairs:  tokens of (prompt, answer), one pair of which a request has; in place of `prompt` and `answer`.

    Raises InputError for a rate or a length that is not positive.
    """

    rate: float
    prompt: Lengths = 512
    answer: Lengths = 128
    shared: int = 0
    pairs: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        real("rate", self.rate, above=0, most=1e9)
        integer("shared", self.shared, least=0, most=MOST_TOKENS)
        for name in ("prompt", "answer"):
            _range(name, getattr(self, name))
        for number, pair in enumerate(self.pairs):
            if len(integers(f"pair {number} of the load", pair, most=MOST_TOKENS)) != 2:
                raise InputError(f"pair {number} of the load is {pair!r}; give tokens of a prompt and of its answer")

    @classmethod
    def of_file(cls, path: Path | str, rate: float, shared: int = 0) -> "Load":
        """A load with the lengths of a file: lines of JSON with prompt_tokens and answer_tokens.

        Raises InputError for other lines, and OSError.
        """
        pairs = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                fields: Any = json.loads(line)
                pairs.append((fields["prompt_tokens"], fields["answer_tokens"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError(
                    f'{path}, line {number}: not like {{"prompt_tokens": 512, "answer_tokens": 128}}'
                ) from None
        if not pairs:
            raise InputError(f"{path} has no lines; each is the lengths of a request")
        return cls(rate, shared=shared, pairs=pairs)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer together."""
        if self.pairs:
            return self.shared + max(prompt + answer for prompt, answer in self.pairs)
        return self.shared + _range("prompt", self.prompt)[1] + _range("answer", self.answer)[1]

    @property
    def mean(self) -> tuple[float, float]:
        """The mean tokens of prompts, without the shared prefix, and of answers."""
        if self.pairs:
            prompt, answer = np.mean(self.pairs, axis=0).tolist()
            return prompt, answer
        return float(np.mean(_range("prompt", self.prompt))), float(np.mean(_range("answer", self.answer)))

    def arrivals(self, count: int, seed: int = 0) -> list[Arrival]:
        """The first `count` requests."""
        return list(islice(self._arrivals(np.random.default_rng(seed)), count))

    def _arrivals(self, random: np.random.Generator) -> Iterator[Arrival]:
        prefix, at = random.integers(WORDS, size=self.shared).tolist(), 0.0
        while True:
            at += random.exponential(1 / self.rate)
            if self.pairs:
                prompt, answer = self.pairs[int(random.integers(len(self.pairs)))]
            else:
                ranges = _range("prompt", self.prompt), _range("answer", self.answer)
                prompt, answer = (int(random.integers(least, most + 1)) for least, most in ranges)
            yield Arrival(at, prefix + random.integers(WORDS, size=prompt).tolist(), answer)


def _range(name: str, lengths: Lengths) -> tuple[int, int]:
    """The fewest and the most tokens. Raises InputError where these are none."""
    sizes = integers(name, lengths, most=MOST_TOKENS)
    if len(sizes) > 2 or sizes[0] > sizes[-1]:
        raise InputError(f"{name}={lengths!r}: give a number of tokens, or the fewest and the most")
    return sizes[0], sizes[-1]
