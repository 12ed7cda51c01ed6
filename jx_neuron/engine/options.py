"""Users' sampling and stopping options, and the Choice of each sequence that follows from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypedDict, cast

import numpy as np

from jx_neuron.config import READ, GenerationConfig
from jx_neuron.engine import draw as drawing
from jx_neuron.engine.draw import Draw
from jx_neuron.engine.processors import Constraint, Processors
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import FLOAT32, integer, integers, per_row, plain, real, shown

PerRow = float | Sequence[float]


class Options(TypedDict, total=False):
    """Sampling and stopping options. An option marked "per row" also takes a list with a value for each row.

    attention_mask:         [b, t], 1 on real tokens; instead of start_ids.
    top_k:                  per row: keeps the most likely tokens; 1 is greedy, 0 keeps the whole vocabulary.
    top_p:                  per row: keeps the fewest of these tokens whose probabilities sum to this.
    top_p_min_tokens:       per row: the least number of tokens that top_p keeps.
    min_p:                  per row: keeps tokens at least this probable, relative to the most likely one.
    temperature:            per row: divides the logits; 0 is greedy.
    seed:                   the same seed gives a row the same tokens in any batch, bucket and degree (in 16 bits,
                            except for rounding); None draws a seed. A list has a seed for each row, which then gets the
                            tokens that it would get alone.
    repetition_penalty:     per row: divides positive logits, and multiplies negative ones, of tokens in prompt or
                            answer.
    presence_penalty:       per row: subtracted from the logits of tokens in the answer.
    frequency_penalty:      per row: subtracted once for each time that a token is in the answer.
    no_repeat_ngram_size:   no run of this number of tokens occurs twice; 0 turns it off.
    logit_bias:             added to the logits of these token ids; -inf bans a token, but not all tokens.
    eos_token_override:     the token or tokens that end a row, instead of the checkpoint's; -1 for none.
    stop_strings:           a text or several that end a row whose answer contains one; needs a tokenizer.
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
class SamplingParams:
    """Sampling and stopping options of the answers to one prompt.

    None is the value of the model's `GenerationConfig`. Without one, decoding is greedy unless top_k, top_p, min_p or
    temperature is set.

    max_tokens: largest number of tokens of an answer; None for as many as n_positions has room for.
    n:          number of answers; the prompt is computed once.
    seed:       the same seed gives the same answers, whatever the other prompts; None draws a seed.
    stop:       a text or several that end an answer that contains one; needs a tokenizer.
    eos_token_id: the token or tokens that end an answer, instead of the checkpoint's; -1 for none.
    logprobs:   adds the log-probability of each token, and of this number of the most likely tokens; None for none.
    grammar:    the form of the answers, from `jx_neuron.engine.grammar.Grammars`; each answer has a copy. None for any.

    The others are those of `jx_neuron.engine.options.Options`.
    """

    max_tokens: int | None = None
    n: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    top_p_min_tokens: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    eos_token_id: int | Sequence[int] | None = None
    logprobs: int | None = None
    grammar: Constraint | None = None

    @property
    def options(self) -> "Options":
        """These parameters as the options of `sample`."""
        names = {"stop": "stop_strings", "eos_token_id": "eos_token_override"}
        others = ("max_tokens", "n", "logprobs", "grammar")
        fields = {names.get(name, name): value for name, value in vars(self).items() if name not in others}
        return cast(Options, {name: value for name, value in fields.items() if value is not None})


@dataclass(frozen=True)
class Choice:
    """Sampling and stopping of one sequence.

    steps:    the most tokens to draw.
    eos:      the tokens that end the sequence.
    logprobs: the number of most likely tokens with log-probabilities, besides the drawn token; None for none at all.
    grammar:  masks logits after `processors`; None for none.
    """

    draw: Draw
    processors: Processors
    steps: int
    eos: Sequence[int]
    stop_strings: Sequence[str]
    logprobs: int | None
    grammar: Constraint | None = None

    @cached_property
    def on_host(self) -> bool:
        """Whether the host chooses tokens from logits, and not the program."""
        observed = self.logprobs is not None or self.grammar is not None
        return observed or self.processors.active or not self.draw.fused


def check_names(options: Options) -> None:
    """Raises TypeError for an unknown option."""
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"no option {unknown[0]!r}; there are {', '.join(sorted(Options.__annotations__))}")


def choices(
    options: Options,
    fallback: GenerationConfig,
    rows: int,
    steps: int,
    *,
    vocab_size: int,
    compiled: int | None,
    eos: Sequence[int],
    logprobs: int | None = None,
    grammar: Constraint | None = None,
) -> list[Choice]:
    """The Choice of each row by `options`.

    fallback: the options that `options` lack.
    compiled: the number of candidates of compiled programs; None where programs are compiled on demand.

    Raises InputError for values that give no distribution, or that the compiled programs cannot draw from.
    """
    processors = _processors(options, rows, vocab_size)
    if (override := options.get("eos_token_override")) is not None:
        eos = [id for id in integers("eos_token_override", override, least=-1, most=vocab_size - 1) if id >= 0]
    if logprobs is not None:
        logprobs = integer("logprobs", logprobs, least=0, most=vocab_size)
    strings = _stop_strings(options.get("stop_strings"))
    in_program = [logprobs is None and grammar is None and not processors[row].active for row in range(rows)]
    draws = _draws(options, fallback, rows, vocab_size, [compiled if fused else None for fused in in_program])
    return [Choice(draw, processors[row], steps, eos, strings, logprobs, grammar) for row, draw in enumerate(draws)]


def pad_of(pad: int | None, eos: Sequence[int], vocab_size: int) -> int:
    """The token that fills a row once it has ended: the padding token, or the end token where there is none."""
    return next((id for id in (pad, *eos) if id is not None and 0 <= id < vocab_size), 0)


def _stop_strings(strings: Any) -> Sequence[str]:
    value = () if strings is None else plain(strings)
    several = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not all(isinstance(one, str) and one for one in several):
        raise InputError(
            f"stop_strings={shown(strings)} is not legal; it takes a text, or a list of several, none of them empty"
        )
    return several


def criteria_of(criteria: Any) -> Any:
    """Returns `criteria`. Raises InputError for what cannot be called."""
    if criteria is None or callable(criteria) or (isinstance(criteria, Sequence) and all(map(callable, criteria))):
        return criteria
    raise InputError(
        f"stopping_criteria_list={shown(criteria)} is not legal; it takes HF's StoppingCriteriaList, or a list of "
        "what is called with ids and scores"
    )


def _draws(
    options: Options, fallback: GenerationConfig, rows: int, vocab_size: int, compiled: Sequence[int | None]
) -> list[Draw]:
    samples = any(options.get(name) is not None for name in ("top_k", "top_p", "temperature", "min_p"))

    def row(name: str) -> list[Any]:
        value = options.get(name)
        return per_row(name, getattr(fallback, name) if value is None else value, rows, READ[name])

    temperatures, top_ks, top_ps, min_tokens = map(row, ("temperature", "top_k", "top_p", "top_p_min_tokens"))
    min_ps = _numbers(options, "min_p", 0.0, rows, least=0, most=1)
    keys = [None] * rows if fallback.deterministic else drawing.keys(options.get("seed"), rows)
    draws = []
    for n in range(rows):
        greedy = np.float32(temperatures[n]) < FLOAT32.tiny or not (fallback.do_sample or samples)
        top_k = 1 if greedy else min(top_ks[n], vocab_size)
        draw = Draw(
            1.0 if greedy else temperatures[n],
            top_k,
            top_ps[n],
            min_ps[n],
            min(min_tokens[n], vocab_size),
            1,
            keys[n],
        )
        count = drawing.candidates(top_k, vocab_size, fallback.global_top_k, compiled[n] if draw.fused else None)
        draws.append(replace(draw, candidates=count))
    return draws


def _processors(options: Options, rows: int, vocab_size: int) -> list[Processors]:
    size = options.get("no_repeat_ngram_size")
    ngram = 0 if size is None else integer("no_repeat_ngram_size", size, least=0)
    bias = _logit_bias(options.get("logit_bias"), vocab_size)
    repetition = _numbers(options, "repetition_penalty", 1.0, rows, above=0)
    presence = _numbers(options, "presence_penalty", 0.0, rows)
    frequency = _numbers(options, "frequency_penalty", 0.0, rows)
    return [Processors(bias, repetition[row], presence[row], frequency[row], ngram) for row in range(rows)]


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


def _numbers(options: Options, name: str, neutral: float, rows: int, **legal: Any) -> list[float]:
    """The number of each row, rounded to float32; `neutral` where `options` lack it."""
    value = options.get(name)
    numbers = per_row(name, neutral if value is None else value, rows, partial(real, **legal))
    return [float(np.float32(number)) for number in numbers]
