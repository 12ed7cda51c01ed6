"""Speculation in the engine: sequences get drafts before a turn is planned, and take what the model drew after it.

A token is a function of logits, parameters and its own uniform number. A draft is accepted while it is what the model
draws, so the tokens are the same as without it.
"""

from collections.abc import Sequence as SequenceOf
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from jx_neuron.engine.drafting import Drafter, FeatureDrafter
from jx_neuron.engine.sequence import Row, Sequence

if TYPE_CHECKING:
    from jx_neuron.engine.engine import Engine


def propose(engine: "Engine") -> None:
    """Gives drafts to sequences that are due for one, and have only their last token left to compute, or compute again.

    An error of a drafter is that of its sequences.
    """
    scheduler = engine.scheduler
    due: dict[Drafter, list[Sequence]] = {}
    for sequence in scheduler.running:
        speculation = sequence.speculation
        goes_on = sequence.remaining == 1 or sequence.again
        if speculation is None or not goes_on or sequence.length == sequence.prompt:
            continue  # the first token may be the host's to choose, for several answers
        if speculation.is_due(0 if sequence.pending else scheduler.draft_room(sequence)):
            due.setdefault(speculation.drafter, []).append(sequence)
    for drafter, sequences in due.items():
        rows = [sequence.speculation for sequence in sequences if sequence.speculation is not None]
        try:
            for sequence, row, draft in zip(sequences, rows, drafter.propose(rows), strict=True):
                legal = takewhile(lambda token: 0 <= token < engine.vocab_size, draft[: row.wanted])
                sequence.draft = [int(token) for token in legal]
        except Exception as error:
            for sequence in sequences:
                engine.fail(sequence, error)


def is_due(sequence: Sequence) -> bool:
    """Whether the next turn may have a draft of a sequence, which takes all of its tokens."""
    return sequence.speculation is not None and not sequence.speculation.wait


def give_features(row: Row, taps: SequenceOf[int], features_tid: np.ndarray) -> None:
    """Gives the drafter of a row what entered its layers, of the `taps` of a step, where the sequence goes on."""
    sequence, speculation = row.sequence, row.sequence.speculation
    count = min(row.count, sequence.computed - row.start)  # fewer where tokens of a draft were refused
    if speculation is None or not isinstance(speculation.drafter, FeatureDrafter) or count < 1:
        return
    own = [taps.index(layer) for layer in speculation.drafter.taps]
    speculation.drafter.take(speculation, row.start, features_tid[:count, own])


def take(row: Row, token_t: SequenceOf[int], logits_tv: np.ndarray | None, *, goes_back: bool) -> None:
    """Gives the sequence of a row what was drawn, up to the first token that is not as drafted.

    goes_back: whether recurrent layers take their state before the row back where a token of the draft is refused.
    token_t:   the token that the program drew after each of the row's tokens.
    logits_tv: where the host chooses, the logits that it chooses from; else None.
    """
    sequence, draft = row.sequence, row.sequence.draft
    sequence.draft, known = [], len(sequence.tokens)
    before = known - row.start - 1  # tokens that are computed again
    for number in range(1 + len(draft)):
        at = before + number
        sequence.computed = row.start + at + 1
        sequence.pending = 0 if sequence.drawing is None else 1
        sequence.sink.take(row, token_t[at], None if logits_tv is None else logits_tv[at])
        if sequence.tokens[known + number :] != draft[number : number + 1]:  # as well where it has ended
            break
    sequence.pending = 0
    if goes_back and sequence.computed < row.start + row.count:
        sequence.computed, sequence.again = row.start, True
    if sequence.speculation is not None and draft:
        accepted = sum(token == guess for token, guess in zip(sequence.tokens[known:], draft, strict=False))
        sequence.speculation.verified(len(draft), accepted)
