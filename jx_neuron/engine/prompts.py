"""Validation of prompts: token ids as lists or arrays of numpy, jax or torch, and the positions where rows start."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from jx_neuron.errors import InputError
from jx_neuron.util.arguments import integer, integers, plain, shown

Restore = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Limits:
    """Limits of a compiled model: rows of a call, ids below `vocab_size`, positions of a row."""

    batch: int
    vocab_size: int
    capacity: int


def split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """One prompt or several as a list, and whether it is one: a text, a row of token ids, or a list of messages."""
    items = plain(prompts)
    if not isinstance(items, Iterable) or isinstance(items, str | bytes | Mapping | Set):
        return [prompts], True
    items = list(items)
    is_one = bool(items) and (not isinstance(first := plain(items[0]), Iterable) or isinstance(first, Mapping))
    return ([items], True) if is_one else (items, False)


def batch_of(ids: Any, limits: Limits) -> np.ndarray:
    """`ids` as an int64 array [b, t]. Raises InputError where they exceed the model's limits."""
    ids_bt = _ids("input_ids", ids, limits.vocab_size)
    if ids_bt.ndim != 2 or not ids_bt.size:
        raise InputError(f"input_ids must be [batch, tokens] with at least one of each; this is {list(ids_bt.shape)}")
    b, width = ids_bt.shape
    if b > limits.batch:
        raise InputError(
            f"input_ids has {b} rows and the model was made for at most {limits.batch} (batch_size, or "
            f"prompt_batch_size); give {limits.batch} at a time, or make the model for {b}"
        )
    if width > limits.capacity:
        raise InputError(
            f"the prompt has {width} tokens and the model was made for n_positions={limits.capacity}; "
            "shorten it, or make the model with a larger n_positions"
        )
    return ids_bt


def row_of(ids: Any, limits: Limits, name: str = "input_ids") -> np.ndarray:
    """One row of ids, [t] or [1, t], of any length, as int32 [t]. Raises InputError where it is empty or no ids."""
    row = _ids(name, ids, limits.vocab_size)
    if row.ndim == 2 and len(row) == 1:
        row = row[0]
    if row.ndim != 1:
        raise InputError(f"{name} must be one row of tokens; this is {list(row.shape)}")
    if not row.size:
        raise InputError(f"{name} has no tokens; it takes one at least")
    return row.astype(np.int32)


def _ids(name: str, ids: Any, vocab_size: int) -> np.ndarray:
    """`ids` as an int64 array. Raises InputError unless they are integers of the vocabulary."""
    if isinstance(ids, Mapping):
        raise InputError(f"{name} takes token ids, and this is a {type(ids).__name__}; give its ['input_ids']")
    source = ids if isinstance(ids, np.ndarray) else plain(ids)
    try:
        array = np.asarray(source)
        if array.dtype.kind not in "iu":  # integers that 64 bits do not hold, or others
            array = np.asarray(source, object)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths; pad them, and give start_ids or attention_mask"
        ) from None
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read: {error}") from error
    if array.dtype == object:
        kinds = {type(id).__name__ for id in array.flat if isinstance(id, bool) or not isinstance(id, int | np.integer)}
        if kinds:
            advice = "; model.tokenizer makes ids of a text" if kinds == {"str"} else ""
            raise InputError(f"{name} must be integers; these are {', '.join(sorted(kinds))}{advice}")
    if (wrong := (array < 0) | (array >= vocab_size)).any():
        at = np.argwhere(wrong)[0].tolist()
        raise InputError(
            f"{name} holds id {shown(plain(array[*at]))} at {at}; ids of this vocabulary are 0 to {vocab_size - 1}"
        )
    return array.astype(np.int64)


def restore_as(like: Any, vocab_size: int) -> Restore:
    """A function that converts arrays of ids to the type of `like`: a list, or an array or tensor of its dtype.

    Where that dtype is too narrow for the vocabulary, int32 is used, or torch's int64.
    """
    kind = type(like).__module__.partition(".")[0]
    if kind == "torch":
        import torch

        dtype = like.dtype if torch.iinfo(like.dtype).max >= vocab_size - 1 else torch.int64
        return lambda array: like.new_tensor(array, dtype=dtype)
    if kind in ("jax", "jaxlib"):
        import jax.numpy as jnp

        return lambda array: jnp.asarray(array, _wide_enough(like.dtype, vocab_size))
    if isinstance(like, np.ndarray):
        return lambda array: array.astype(_wide_enough(like.dtype, vocab_size))
    return lambda array: array.tolist()


def like(ids: Any, array: np.ndarray) -> Any:
    """`array` as a torch tensor where `ids` is one."""
    if type(ids).__module__.partition(".")[0] != "torch":
        return array
    import torch

    return torch.from_numpy(array)


def _wide_enough(dtype: np.dtype[Any], vocab_size: int) -> np.dtype[Any]:
    narrow = dtype.kind in "iu" and np.iinfo(dtype).max < vocab_size - 1
    return np.dtype(np.int32) if narrow else dtype


def length_of(sequence_length: Any, width: int, limits: Limits) -> int:
    """The most positions of prompt and answer. Raises InputError where the model has fewer."""
    length = integer("sequence_length", sequence_length)
    if not width <= length <= limits.capacity:
        raise InputError(
            f"sequence_length={shown(length)} must be from {width}, the width of the prompt, to {limits.capacity}, "
            "the n_positions that the model was made for"
        )
    return length


def rows_of(
    ids_bt: np.ndarray, start_ids: Any = None, attention_mask: Any = None, *, padding_side: str = "left"
) -> list[np.ndarray]:
    """The tokens of each row without its padding, int32.

    start_ids [b] is the index of the first real token of each left-padded row. attention_mask [b, t] is 1 on real
    tokens, which must be contiguous. Raises InputError where they do not fit, or a row has no token.
    """
    b, t = ids_bt.shape
    first, last = np.zeros(b, np.int64), np.full(b, t)
    if start_ids is not None and attention_mask is not None:
        raise InputError("give start_ids or attention_mask, not both")
    if start_ids is not None:
        edge = _starts(start_ids, b, t - 1)
        if padding_side == "left":
            first = edge
        else:
            last = t - edge
    elif attention_mask is not None:
        mask = mask_of(attention_mask, (b, t))
        if not mask.any(-1).all():
            raise InputError(
                f"row {mask.any(-1).argmin()} of attention_mask has no real token; each takes one at least"
            )
        first, last = mask.argmax(-1), t - mask[:, ::-1].argmax(-1)
        if (mask.sum(-1) != last - first).any():
            raise InputError("attention_mask has a gap inside a row; padding may be only on its left and right")
    return [row[f:e].astype(np.int32) for row, f, e in zip(ids_bt, first, last, strict=True)]


def mask_of(attention_mask: Any, shape: tuple[int, int]) -> np.ndarray:
    """The mask of real tokens, bool [b, t]. Raises InputError unless it has that shape and holds only 0 and 1."""
    try:
        mask = np.asarray(plain(attention_mask))
    except ValueError:
        raise InputError("attention_mask has rows of different lengths") from None
    if mask.shape != shape:
        raise InputError(f"attention_mask {list(mask.shape)} must be {list(shape)}, a number for each token so far")
    if mask.dtype.kind not in "biuf" or (wrong := (mask != 0) & (mask != 1)).any():
        what = f"{mask[wrong][0]}" if mask.dtype.kind in "iuf" else f"{mask.dtype}"
        raise InputError(f"attention_mask is 1 on real tokens and 0 on padding; this one holds {what}")
    return mask == 1


def check_end(end: int, capacity: int) -> None:
    """Raises InputError where a sequence of `end` positions does not fit."""
    if end > capacity:
        raise InputError(
            f"{shown(end)} positions were asked for, and the model was made for n_positions={capacity}; "
            "ask for fewer, or make the model with a larger n_positions"
        )


def starts(cache_ids: Any, start_ids: Any, shape: tuple[int, int], limits: Limits) -> np.ndarray:
    """The position of the next token of each of b rows, int32 [b], without padding.

    cache_ids is the position of the first of t tokens, or of all, with padding counted. Raises InputError where they
    exceed the model's limits.
    """
    b, t = shape
    positions = integers("cache_ids", cache_ids, least=0)
    first = positions[0]
    if positions not in ([first], [*range(first, first + t)]):
        raise InputError(
            f"cache_ids={shown(positions)} must be the position of the first token, or {t} that follow each other"
        )
    check_end(first + t, limits.capacity)
    padding_b = np.zeros(b, int) if start_ids is None else _starts(start_ids, b, first)
    return (first - padding_b).astype(np.int32)


def _starts(start_ids: Any, rows: int, most: int) -> np.ndarray:
    edges = integers("start_ids", start_ids, least=0, most=most)
    if len(edges) != rows:
        raise InputError(f"start_ids={shown(edges)} must be {rows} positions from 0 to {most}, one for each row")
    return np.array(edges)
