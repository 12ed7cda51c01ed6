"""Sampling parameters as keywords: the fields of `SamplingParams`, and Hugging Face's names for them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from jx_neuron.engine.options import SamplingParams
from jx_neuron.engine.processors import Constraint
from jx_neuron.errors import InputError
from jx_neuron.util.arguments import flag

Samplings = SamplingParams | Sequence[SamplingParams] | None


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingParams`, and under HF's names:

    max_new_tokens:       max_tokens.
    num_return_sequences: n.
    stop_strings:         stop.
    do_sample:            False takes the most likely token, whatever temperature, top_k, top_p and min_p are. True
                          samples, with the model's GenerationConfig or else temperature 1 and top_k 50, where none of
                          these four is set.
    """

    max_new_tokens: int | None
    num_return_sequences: int
    stop_strings: str | Sequence[str] | None
    do_sample: bool | None
    max_tokens: int | None
    n: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    top_p_min_tokens: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    logprobs: int | None
    grammar: Constraint | None


_NAMES = {"max_new_tokens": "max_tokens", "num_return_sequences": "n", "stop_strings": "stop"}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def samplings_of(sampling: Samplings, keywords: SamplingKeywords, prompts: int) -> list[SamplingParams]:
    """The parameters of each of `prompts` prompts: those of `sampling`, with `keywords` in their place.

    Raises InputError for another number of them, and TypeError for a keyword that is unknown, or given under two names.
    """
    several = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * prompts
    if len(several) != prompts or not all(isinstance(params, SamplingParams) for params in several):
        raise InputError(f"sampling takes a SamplingParams, or {prompts}, one for each prompt")
    changes = _fields(keywords)
    do_sample = changes.pop("do_sample", None)
    return [_chosen(replace(params, **changes), do_sample) for params in several]


def _fields(keywords: SamplingKeywords) -> dict[str, Any]:
    legal = [*SamplingKeywords.__annotations__]
    changes: dict[str, Any] = {}
    for keyword, value in keywords.items():
        if keyword not in legal:
            raise TypeError(f"no sampling parameter {keyword!r}; there are {', '.join(sorted(legal))}")
        name = _NAMES.get(keyword, keyword)
        if name in changes:
            raise TypeError(f"{keyword} and {name} are the same; give one of them")
        changes[name] = value
    if "n" in changes and changes["n"] is None:
        del changes["n"]
    return changes


def _chosen(params: SamplingParams, do_sample: Any) -> SamplingParams:
    if do_sample is None:
        return params
    if not flag("do_sample", do_sample):
        return replace(params, temperature=0.0, top_k=None, top_p=None, min_p=None)
    if any(getattr(params, name) is not None for name in _SAMPLING):
        return params
    return replace(params, min_p=0.0)  # removes nothing, and has tokens sampled
