"""The answer, step by step: the next step is under way while one is read, unless the host has to choose its tokens."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.engine.draw import largest
from jx_neuron.engine.options import Request
from jx_neuron.engine.processors import log_softmax
from jx_neuron.engine.session import Session
from jx_neuron.engine.stopping import Criteria, Detokenizer, StopStrings
from jx_neuron.nn.sampling import NOT_FINITE


@dataclass(frozen=True)
class Step:
    """One token of each of b rows.

    tokens:         ids [b]; the padding token in a row that has ended before.
    text:           what each row's text grew by; None where the model has no tokenizer. A character that takes several
                    tokens comes with the last of them.
    logprobs:       log-probability of each token by the model itself, float32 [b], natural; None where not asked for.
    top_tokens:     the most likely ids [b, n], most likely first, and
    top_logprobs:   their log-probabilities, float32 [b, n].
    finish_reasons: for each row None while it goes on, "stop" from its end token (or whatever ended it) on, and
                    "length" where it was cut short.
    seconds:        since the prompt was begun.
    """

    tokens: np.ndarray
    text: tuple[str, ...] | None
    logprobs: np.ndarray | None
    top_tokens: np.ndarray | None
    top_logprobs: np.ndarray | None
    finish_reasons: tuple[str | None, ...]
    seconds: float

    @property
    def ended(self) -> np.ndarray:
        """Which rows have ended, bool [b]."""
        return np.array([reason is not None for reason in self.finish_reasons])


def answer(
    session: Session,
    asked: Request,
    ids_bt: np.ndarray,
    prompts: Sequence[np.ndarray],
    tokenizer: Any = None,
    *,
    text: bool = False,
) -> Iterator[Step]:
    """Steps until every row has ended, or has been given `asked.steps` tokens.

    ids_bt [b, t] is what stopping criteria see before the answer, `prompts` the real tokens of each row.
    """
    began = time.perf_counter()
    prompt_lists = [row.tolist() for row in prompts]
    strings = StopStrings(asked.stop_strings, tokenizer, prompt_lists) if asked.stop_strings else None
    criteria = Criteria(asked.criteria, ids_bt) if asked.criteria else None
    texts = [Detokenizer(tokenizer, p, skip_special_tokens=True) for p in prompt_lists] if text else None
    stopped_b = np.zeros(len(prompts), bool)
    drawn = _on_host(session, asked, prompt_lists) if asked.on_host else _in_program(session, asked)
    for number, (drawn_b, logits_bv) in enumerate(drawn, start=1):
        session.require_finite(stopped_b | (drawn_b != NOT_FINITE))
        before_b, token_b = stopped_b, np.where(stopped_b, asked.pad, drawn_b)
        stopped_b = stopped_b | np.isin(token_b, asked.eos)
        for found in (strings.found(token_b) if strings else False, criteria.met(token_b) if criteria else False):
            stopped_b = stopped_b | found
        last_b = stopped_b | (number == asked.steps)
        grown = None
        if texts is not None:
            rows = zip(texts, token_b.tolist(), before_b, last_b, strict=True)
            grown = tuple("" if over else one.add(token, last=last) for one, token, over, last in rows)
        yield Step(
            token_b,
            grown,
            *_log_probabilities(logits_bv, token_b, asked.logprobs),
            tuple("stop" if stopped else "length" if number == asked.steps else None for stopped in stopped_b),
            time.perf_counter() - began,
        )
        if stopped_b.all():
            return


Drawn = Iterator[tuple[np.ndarray, np.ndarray | None]]


def _in_program(session: Session, asked: Request) -> Drawn:
    """Tokens [n]; step i + 1 is under way before step i is read."""
    if asked.steps < 1:
        return
    if session.copies == 1:
        token_b1 = session.prefill(asked.draw, goes_on=asked.steps > 1).token_b1
    else:
        with session.lock:
            logits_nv = session.first(session.prefill(goes_on=asked.steps > 1))
        token_b1, _ = _choose(asked, logits_nv)
    for _ in range(1, asked.steps):
        following = session.decode(token_b1, asked.draw)
        yield np.asarray(token_b1).reshape(-1)[: session.count], None
        token_b1 = following.token_b1
    yield np.asarray(token_b1).reshape(-1)[: session.count], None


def _on_host(session: Session, asked: Request, prompts: Sequence[list[int]]) -> Drawn:
    """Tokens [n] and the logits [n, v] that they were drawn from, before anything bent them."""
    answers: list[list[int]] = [[] for _ in prompts]
    token_b: np.ndarray | None = None
    for _ in range(asked.steps):
        with session.lock:
            if token_b is None:
                logits_bv = session.first(session.prefill(goes_on=asked.steps > 1))
            else:
                logits_bv = session.last(session.decode(token_b))
        token_b, logits_bv = _choose(asked, logits_bv, prompts, answers)
        yield token_b, logits_bv
        for row, token in zip(answers, token_b.tolist(), strict=True):
            row.append(token)


def _choose(
    asked: Request,
    logits_bv: np.ndarray,
    prompts: Sequence[Sequence[int]] = (),
    answers: Sequence[Sequence[int]] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n], NOT_FINITE where a row's logits are not, and logits with zeros in such rows."""
    finite_b = np.isfinite(logits_bv).all(-1)
    if not finite_b.all():
        logits_bv = np.where(finite_b[:, None], logits_bv, np.float32(0))
    bent_bv = asked.processors(logits_bv, prompts, answers) if asked.processors.active else logits_bv
    return np.where(finite_b, asked.draw.choose(bent_bv), np.int32(NOT_FINITE)), logits_bv


def _log_probabilities(
    logits_bv: np.ndarray | None, token_b: np.ndarray, count: int | None
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    if count is None or logits_bv is None:
        return None, None, None
    logprobs_bv = log_softmax(logits_bv)
    chosen_b = np.take_along_axis(logprobs_bv, token_b[:, None], axis=-1)[:, 0]
    if not count:
        return chosen_b, None, None
    top_bn = np.stack([largest(row, count) for row in logprobs_bv])
    return chosen_b, top_bn, np.take_along_axis(logprobs_bv, top_bn, axis=-1)
