"""What a user may ask of `sample` and `stream`, and what that comes to for one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from jx_neuron.config import GenerationConfig
from jx_neuron.errors import InputError
from jx_neuron.generation import draw as drawing
from jx_neuron.generation.draw import Draw, per_row
from jx_neuron.generation.processors import Processors

PerRow = float | Sequence[float]


class Options(TypedDict, total=False):
    """How tokens are chosen, and when a row has ended; what says "a row" also takes one value for each.

    attention_mask:         [b, t], 1 on real tokens; instead of start_ids.
    top_k:                  a row: keeps the most likely tokens; 1 is greedy, 0 keeps the whole vocabulary.
    top_p:                  a row: of those keeps the fewest whose probabilities sum to this.
    top_p_min_tokens:       a row: but at least so many.
    min_p:                  a row: keeps tokens at least this probable, relative to the most likely one.
    temperature:            a row: divides the logits; 0 is greedy.
    seed:                   the same seed gives a row the same tokens in any batch, bucket and degree (in 16 bits, but
                            for rounding); None draws one. A list holds one a row, each as if that row were alone.
    repetition_penalty:     a row: divides positive logits, and multiplies negative ones, of tokens seen in prompt or
                            answer.
    presence_penalty:       a row: subtracted from the logits of tokens that are in the answer.
    frequency_penalty:      a row: subtracted once for each time that a token is in the answer.
    no_repeat_ngram_size:   no so many tokens in a row come twice; 0 lets them.
    logit_bias:             added to the logits of these token ids.
    eos_token_override:     the token or tokens that end a row, instead of the checkpoint's; -1 for none.
    stop_strings:           a text or several that end a row whose answer comes to hold one; takes a tokenizer.
    stopping_criteria_list: HF stopping criteria: called with ids [b, tokens so far] as a torch tensor, and None.
    """

    attention_mask: Any
    top_k: int | Sequence[int]
    top_p: PerRow
    top_p_min_tokens: int | Sequence[int]
    min_p: PerRow
    temperature: PerRow
    seed: int | Sequence[int] | None
    repetition_penalty: PerRow
    presence_penalty: PerRow
    frequency_penalty: PerRow
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    eos_token_override: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    stopping_criteria_list: Any


@dataclass(frozen=True)
class Request:
    """What one call asks for.

    steps:    how many tokens a row may be given.
    eos:      tokens that end a row.
    pad:      what an ended row goes on in.
    logprobs: how many of the most likely tokens to give log-probabilities of, beside the chosen; None for none at all.
    """

    draw: Draw
    processors: Processors
    steps: int
    eos: Sequence[int]
    pad: int
    stop_strings: Sequence[str]
    criteria: Any
    logprobs: int | None

    @property
    def on_host(self) -> bool:
        """Whether tokens are chosen from logits that the host reads, and not in the program."""
        return self.processors.active or self.logprobs is not None or not self.draw.fused


def check_names(options: Options) -> None:
    """Raises TypeError for an option that there is not."""
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"no option {unknown[0]!r}; there are {', '.join(sorted(Options.__annotations__))}")


def request(
    options: Options,
    fallback: GenerationConfig | None,
    rows: int,
    steps: int,
    *,
    vocab_size: int,
    compiled: int | None,
    eos: Sequence[int],
    pad: int | None,
    logprobs: int | None,
) -> Request:
    """What `options` come to for so many rows.

    fallback: says what `options` do not. `compiled` is the runtime's number of candidates, None where it has any.

    Raises InputError for values that make no distribution, or that the compiled programs cannot draw from.
    """
    by = fallback or GenerationConfig(do_sample=True)
    processors = _processors(options, rows, vocab_size)
    if (override := options.get("eos_token_override")) is not None:
        eos = [id for id in np.atleast_1d(override).tolist() if id >= 0]
    if logprobs is not None and not 0 <= logprobs <= vocab_size:
        raise InputError(f"logprobs={logprobs!r} is not legal; it takes 0 (the chosen token's alone) to {vocab_size}")
    strings = [] if (given := options.get("stop_strings")) is None else given
    found = Request(
        _draw(options, by, rows, vocab_size, None if processors.active or logprobs is not None else compiled),
        processors,
        steps,
        eos,
        (eos[0] if eos else 0) if pad is None else pad,
        [strings] if isinstance(strings, str) else list(strings),
        options.get("stopping_criteria_list"),
        logprobs,
    )
    if not all(isinstance(one, str) and one for one in found.stop_strings):
        raise InputError(f"stop_strings={strings!r} is not legal; it takes a text, or several, none of them empty")
    return found


def _draw(options: Options, by: GenerationConfig, rows: int, vocab_size: int, compiled: int | None) -> Draw:
    drawn = any(options.get(name) is not None for name in ("top_k", "top_p", "temperature", "min_p"))
    asked = {name: options.get(name) for name in ("top_k", "top_p", "temperature", "top_p_min_tokens")}
    given = {name: getattr(by, name) if value is None else value for name, value in asked.items()}
    if not by.do_sample and not drawn:
        given["top_k"] = 1

    def row(name: str, value: Any, dtype: Any, legal: Any, words: str) -> np.ndarray:
        return per_row(name, value, rows, dtype, legal, words)

    temperature_b = row("temperature", given["temperature"], np.float32, lambda x: x >= 0, "0 or more")
    top_k_b = row("top_k", given["top_k"], np.int32, lambda x: x >= 0, "0 (all) or more")
    top_p_b = row("top_p", given["top_p"], np.float32, lambda x: (x > 0) & (x <= 1), "above 0 and at most 1")
    min_tokens_b = row("top_p_min_tokens", given["top_p_min_tokens"], np.int32, lambda x: x >= 1, "1 or more")
    min_p = options.get("min_p")
    min_p_b = row("min_p", 0.0 if min_p is None else min_p, np.float32, lambda x: (x >= 0) & (x <= 1), "from 0 to 1")
    top_k_b = np.where(temperature_b == 0, np.int32(1), top_k_b)
    temperature_b = np.where(temperature_b == 0, np.float32(1), temperature_b)
    streams = None if by.deterministic else drawing.streams(options.get("seed"), rows)
    found = Draw(temperature_b, top_k_b, top_p_b, min_p_b, min_tokens_b, 1, streams)
    count = drawing.candidates(top_k_b, vocab_size, by.global_top_k, compiled if found.fused else None)
    return Draw(temperature_b, top_k_b, top_p_b, min_p_b, min_tokens_b, count, streams)


def _processors(options: Options, rows: int, vocab_size: int) -> Processors:
    bias = dict(options.get("logit_bias") or {})
    if not all(isinstance(token, int | np.integer) and 0 <= token < vocab_size for token in bias):
        raise InputError(f"logit_bias={bias!r} is not legal; its keys are token ids from 0 to {vocab_size - 1}")
    size = options.get("no_repeat_ngram_size") or 0
    if not isinstance(size, int) or size < 0:
        raise InputError(f"no_repeat_ngram_size={size!r} is not legal; it takes a positive integer, or 0 for none")

    def penalty(name: str, neutral: float, legal: Any, words: str) -> np.ndarray:
        value = options.get(name)
        return per_row(name, neutral if value is None else value, rows, np.float32, legal, words)

    return Processors(
        bias,
        penalty("repetition_penalty", 1.0, lambda x: (x > 0) & np.isfinite(x), "above 0"),
        penalty("presence_penalty", 0.0, np.isfinite, "that is finite"),
        penalty("frequency_penalty", 0.0, np.isfinite, "that is finite"),
        size,
    )
