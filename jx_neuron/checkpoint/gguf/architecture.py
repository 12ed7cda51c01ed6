"""An architecture of GGUF files: HF's names of its tensors and config fields, and how tensors are stored."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jx_neuron.checkpoint.gguf.keys import Header
from jx_neuron.checkpoint.tensor_files import Array

Names = dict[str, str | tuple[str, ...]]
Fields = dict[str, str | None]
Edit = Callable[[Array, int, int], Array]
"""Of values in the file's layout, and the numbers of query and of key heads: the values in HF's."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How an architecture becomes HF's model.

    model_type: HF's.
    names:      HF's names of tensors, without .weight and .bias. A tuple splits a tensor of query, key and value
                rows, and {r} one of a row for each head.
    fields:     HF's names of fields, by attribute of Keys, where they are not the usual; None where it has no such one.
    numbers:    HF's names of further fields, by key.
    flags:      HF's names of fields that are true where the first layer has one of these tensors.
    more:       further fields.
    rope:       HF's rope_parameters; None where positions are no rotation.
    partial:    whether a part of a head may be rotated.
    edits:      how tensors are laid out as in HF, by name.
    one_added:  whether weights of norms are stored plus one.
    in_order:   whether a SentencePiece vocabulary is in the order in which its pieces merge, whatever their scores.
    lists:      HF's names and shapes of tensors of which a key has one number for each layer.
    several:    keys that may have a number for each layer.
    reads:      further keys, which `more` and `rope` read.
    legal:      values of further keys, which need no field.
    """

    model_type: str
    names: Names | Callable[[Header], Names]
    fields: Fields = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    more: Callable[[Header], dict[str, Any]] = lambda header: {}
    rope: Callable[[Header], dict[str, Any]] | None = Header.rope
    partial: bool = False
    edits: Mapping[str, Edit] = field(default_factory=dict)
    one_added: bool = False
    in_order: bool = False
    lists: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    several: Collection[str] = ()
    reads: Collection[str] = ()
    legal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def decoder(modules: str, layer: str, block: Mapping[str, str | tuple[str, ...]]) -> Names:
    """Names of embeddings, last norm and head, and after the prefix `layer` of each layer's tensors."""

    def within(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        prefix = f"{layer}.{{i}}."
        return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)

    top: Names = dict(zip(("token_embd", "output_norm", "output"), modules.split(), strict=True))
    return top | {f"blk.{{i}}.{name}": within(hf) for name, hf in block.items()}


def llama_like(**block: str | tuple[str, ...]) -> Names:
    return decoder("model.embed_tokens model.norm lm_head", "model.layers", block)


def halves(rows: Array, n: int, k: int) -> Array:
    """[n (2 h/2), …] of [n (h/2 2), …]: rows in halves again, which are in pairs for interleaved rotation."""
    return rows.reshape(n, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def by_key_head(rows: Array, n: int, k: int) -> Array:
    """Query, key and value rows end to end, as (k (n/k + 2) h): of each key head its queries, its key and its value."""
    h, rest = len(rows) // (n + 2 * k), rows.shape[1:]
    q, key, value = np.split(rows, [n * h, (n + k) * h])
    parts = [part.reshape(k, -1, h, *rest) for part in (q, key, value)]
    return np.concatenate(parts, axis=1).reshape(rows.shape)


def without_one(rows: Array, n: int, k: int) -> Array:
    """The weights of a norm that multiplies by 1 + weight."""
    return rows.astype(np.float32) - np.float32(1)


def transposed(rows: Array, n: int, k: int) -> Array:
    """[out, in] as [in, out]."""
    return np.ascontiguousarray(rows.T)


ROWS: Mapping[str, Callable[[int, int], int]] = {  # of tensors that are split or rearranged, in heads
    "attn_q": lambda n, k: n,
    "attn_k": lambda n, k: k,
    "attn_qkv": lambda n, k: n + 2 * k,
}
PAIRS: Mapping[str, Edit] = {"attn_q": halves, "attn_k": lambda rows, n, k: halves(rows, k, k)}
