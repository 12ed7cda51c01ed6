"""What a user may ask of `sample` and `stream`, and what that comes to for one call."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import numpy as np

from jx_neuron.config import READ, GenerationConfig
from jx_neuron.engine import draw as drawing
from jx_neuron.engine.draw import Draw
from jx_neuron.engine.processors import Processors
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import FLOAT32, integer, integers, per_row, plain, real, shown

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
    logit_bias:             added to the logits of these token ids; -inf bans one, and not every one may be.
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
        eos = [id for id in integers("eos_token_override", override, least=-1, most=vocab_size - 1) if id >= 0]
    if logprobs is not None:
        logprobs = integer("logprobs", logprobs, least=0, most=vocab_size)
    return Request(
        _draw(options, by, rows, vocab_size, None if processors.active or logprobs is not None else compiled),
        processors,
        steps,
        eos,
        next((id for id in (pad, *eos) if id is not None and 0 <= id < vocab_size), 0),
        _stop_strings(options.get("stop_strings")),
        _criteria(options.get("stopping_criteria_list")),
        logprobs,
    )


def _stop_strings(strings: Any) -> Sequence[str]:
    value = () if strings is None else plain(strings)
    several = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not all(isinstance(one, str) and one for one in several):
        raise InputError(
            f"stop_strings={shown(strings)} is not legal; it takes a text, or a list of several, none of them empty"
        )
    return several


def _criteria(criteria: Any) -> Any:
    if criteria is None or callable(criteria) or (isinstance(criteria, Sequence) and all(map(callable, criteria))):
        return criteria
    raise InputError(
        f"stopping_criteria_list={shown(criteria)} is not legal; it takes HF's StoppingCriteriaList, or a list of "
        "what is called with ids and scores"
    )


def _draw(options: Options, by: GenerationConfig, rows: int, vocab_size: int, compiled: int | None) -> Draw:
    drawn = any(options.get(name) is not None for name in ("top_k", "top_p", "temperature", "min_p"))

    def row(name: str) -> list[Any]:
        value = options.get(name)
        return per_row(name, getattr(by, name) if value is None else value, rows, READ[name])

    temperature_b = np.array(row("temperature"), np.float32)
    greedy_b = temperature_b < FLOAT32.tiny
    if not by.do_sample and not drawn:
        greedy_b[:] = True
    top_k_b = np.where(greedy_b, 1, np.minimum(row("top_k"), vocab_size)).astype(np.int32)
    temperature_b = np.where(greedy_b, np.float32(1), temperature_b)
    top_p_b = np.array(row("top_p"), np.float32)
    min_tokens_b = np.minimum(row("top_p_min_tokens"), vocab_size).astype(np.int32)
    min_p_b = _number(options, "min_p", 0.0, rows, least=0, most=1)
    streams = None if by.deterministic else drawing.streams(options.get("seed"), rows)
    draw = Draw(temperature_b, top_k_b, top_p_b, min_p_b, min_tokens_b, 1, streams)
    count = drawing.candidates(top_k_b, vocab_size, by.global_top_k, compiled if draw.fused else None)
    return replace(draw, candidates=count)


def _processors(options: Options, rows: int, vocab_size: int) -> Processors:
    size = options.get("no_repeat_ngram_size")
    return Processors(
        _logit_bias(options.get("logit_bias"), vocab_size),
        _number(options, "repetition_penalty", 1.0, rows, above=0),
        _number(options, "presence_penalty", 0.0, rows),
        _number(options, "frequency_penalty", 0.0, rows),
        0 if size is None else integer("no_repeat_ngram_size", size, least=0),
    )


def _logit_bias(mapping: Any, vocab_size: int) -> dict[int, float]:
    if not isinstance(mapping, Mapping | None):
        raise InputError(f"logit_bias={shown(mapping)} is not legal; it takes a mapping of token ids to numbers")
    bias = {
        integer("an id of logit_bias", id, least=0, most=vocab_size - 1): real(
            f"logit_bias[{shown(id)}]", value, least=-math.inf
        )
        for id, value in (mapping or {}).items()
    }
    if sum(value == -math.inf for value in bias.values()) == vocab_size:
        raise InputError(f"logit_bias bans each of the {vocab_size} tokens; leave one at least")
    return bias


def _number(options: Options, name: str, neutral: float, rows: int, **legal: Any) -> np.ndarray:
    """A number of each row, float32 [rows]; `neutral` where it is not among the options."""
    value = options.get(name)
    return np.array(per_row(name, neutral if value is None else value, rows, partial(real, **legal)), np.float32)
