"""Token ids as users hold them (lists, numpy, jax, torch), to rows and back."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jx_neuron.errors import InputError

Restore = Callable[[np.ndarray], Any]


def as_array(ids: Any, name: str = "input_ids") -> tuple[np.ndarray, Restore]:
    """`ids` as an int64 array [b, t], and what turns such an array into the kind that was given.

    Raises InputError unless they are integers, in rows of one length.
    """
    kind = type(ids).__module__.partition(".")[0]
    host = ids.detach().cpu().numpy() if kind == "torch" else ids
    try:
        array = np.asarray(host)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths; pad them, and give start_ids or attention_mask"
        ) from None
    if array.ndim != 2 or not array.size:
        raise InputError(f"{name} must be [batch, tokens] with at least one of each; this is {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must be integers; these are {array.dtype}")
    return array.astype(np.int64), _restore(ids, kind)


def _restore(like: Any, kind: str) -> Restore:
    if kind == "torch":
        restore: Restore = like.new_tensor
        return restore
    if kind in ("jax", "jaxlib"):
        import jax.numpy as jnp

        return lambda array: jnp.asarray(array, like.dtype)
    if isinstance(like, np.ndarray):
        return lambda array: array.astype(like.dtype)
    return lambda array: array.tolist()


def rows_of(
    ids_bt: np.ndarray, start_ids: Any = None, attention_mask: Any = None, *, padding_side: str = "left"
) -> list[np.ndarray]:
    """The tokens of each row without its padding, int32.

    start_ids [b] is the first real position of each left-padded row; attention_mask [b, t] is 1 on real tokens, which
    must be in one piece. Raises InputError where they do not fit, or a row has no token.
    """
    b, t = ids_bt.shape
    first, last = np.zeros(b, np.int64), np.full(b, t)
    if start_ids is not None and attention_mask is not None:
        raise InputError("give start_ids or attention_mask, not both")
    if start_ids is not None:
        edge = np.asarray(start_ids).reshape(-1)
        if len(edge) != b or (edge < 0).any() or (edge >= t).any():
            raise InputError(f"start_ids={edge.tolist()} must be {b} positions from 0 to {t - 1}, one for each row")
        if padding_side == "left":
            first = edge
        else:
            last = t - edge
    elif attention_mask is not None:
        mask = np.asarray(attention_mask) != 0
        if mask.shape != (b, t) or not mask.any(-1).all():
            raise InputError(
                f"attention_mask {list(mask.shape)} must be [{b}, {t}] with at least one real token in each row"
            )
        first, last = mask.argmax(-1), t - mask[:, ::-1].argmax(-1)
        if (mask.sum(-1) != last - first).any():
            raise InputError("attention_mask has a gap inside a row; padding may stand only on its left and right")
    return [row[f:e].astype(np.int32) for row, f, e in zip(ids_bt, first, last, strict=True)]


def starts(cache_ids: Any, start_ids: Any, rows: int) -> np.ndarray:
    """Where each row's next token stands, int32 [rows], by the position of the first among padded ones."""
    first = int(np.asarray(cache_ids).reshape(-1)[0])
    start_b = np.full(rows, first, np.int32)
    if start_ids is not None:
        start_b -= np.asarray(start_ids, np.int32).reshape(-1)
    if (start_b < 0).any():
        raise InputError(f"cache_ids from {first} on come before the start_ids of a row; they go on behind its prompt")
    return start_b


def check_end(end: int, capacity: int) -> None:
    """Raises InputError where a sequence of `end` positions does not fit."""
    if end > capacity:
        raise InputError(
            f"{end} positions were asked for, and the model was made for n_positions={capacity}; "
            "ask for fewer, or make the model with a larger n_positions"
        )


def check_ids(ids_bt: np.ndarray, vocab_size: int) -> None:
    """Raises InputError where an id is none of the vocabulary."""
    if (wrong := (ids_bt < 0) | (ids_bt >= vocab_size)).any():
        row, at = np.argwhere(wrong)[0]
        raise InputError(
            f"row {row} of input_ids holds id {ids_bt[row, at]} at {at}; "
            f"ids of this vocabulary are 0 to {vocab_size - 1}"
        )


def check(ids_bt: np.ndarray, *, batch: int, vocab_size: int, capacity: int, length: int) -> None:
    """Raises InputError where the compiled model cannot take `ids_bt`, or cannot answer up to `length` positions."""
    b, width = ids_bt.shape
    if b > batch:
        raise InputError(
            f"input_ids has {b} rows and the model was made for at most {batch} (batch_size, or prompt_batch_size); "
            f"give {batch} at a time, or make the model for {b}"
        )
    check_ids(ids_bt, vocab_size)
    if width > capacity:
        raise InputError(
            f"the prompt has {width} tokens and the model was made for n_positions={capacity}; "
            "shorten it, or make the model with a larger n_positions"
        )
    if not width <= length <= capacity:
        raise InputError(
            f"sequence_length={length} must be from {width}, the width of the prompt, to {capacity}, "
            "the n_positions that the model was made for"
        )
