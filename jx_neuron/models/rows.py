"""Rows of weight tables that families share: HF's name of a module, ours, and the letters of its axes.

https://github.com/NVIDIA/Megatron-LM: a column-parallel projection has its outputs split over the cores, a row-parallel
one its inputs, so that a pair of them needs one all-reduce (Shoeybi et al., arXiv:1909.08053).
"""

from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from jx_neuron.checkpoint.weights import W
from jx_neuron.nn.sharding import AXIS

__all__ = [
    "alibi",
    "attention",
    "column_parallel",
    "embedding",
    "gated_mlp",
    "grouped_qkv",
    "heads_rms_norm",
    "key_head_numbers",
    "layer_norm",
    "rms_norm",
    "row_parallel",
]

Q, K, V = "[n h] + k h + k h", "n h + [k h] + k h", "n h + k h + [k h]"  # of a fused projection
GATE, UP = "[f] + f", "f + [f]"


def embedding(source: str, target: str, width: str = "d") -> W:
    """A table of the vocabulary, or a head."""
    return W(f"{source}.weight", f"{target}.embedding", f"v {width} -> v {width}", P(AXIS, None))


def rms_norm(source: str, target: str, width: str = "d") -> W:
    """A scale over the model's width, or each head's, "h"."""
    return W(f"{source}.weight", f"{target}.scale", f"{width} -> {width}")


def heads_rms_norm(source: str, target: str, heads: str) -> W:
    """The scale of a norm over all query heads, "n", or key heads, "k", together."""
    return W(f"{source}.weight", f"{target}.scale", f"({heads} h) -> {heads} h", P(AXIS, None))


def key_head_numbers(target: str) -> W:
    """1, 2, … for the key heads, which copies of a head share (`head_copies`), and 0 for those that are padding."""
    return W(_key_head_numbers, target, "k -> k", P(AXIS))


def _key_head_numbers(config: Any) -> np.ndarray:
    return np.arange(1, config.sizes["k"] + 1, dtype=np.float32)


def layer_norm(source: str, target: str, *, bias: bool = True) -> tuple[W, ...]:
    """Scale and bias over the model's width."""
    return (rms_norm(source, target), W(f"{source}.bias", f"{target}.bias", "d -> d"))[: 1 + bias]


def column_parallel(source: str, target: str, outputs: str, *, bias: bool = True) -> tuple[W, ...]:
    """A torch Linear from "d" to `outputs`, such as "n h", whose first axis is split; "[f] + f" takes a part of one."""
    return _column_parallel(
        source, target, _axis(outputs), outputs.partition("[")[2].partition("]")[0] or outputs, bias
    )


def row_parallel(source: str, target: str, inputs: str, *, bias: bool = True) -> tuple[W, ...]:
    """A torch Linear from `inputs`, such as "n h", whose first axis is split, to "d"."""
    rest = [None] * len(inputs.split())
    kernel = W(f"{source}.weight", f"{target}.kernel", f"d {_axis(inputs)} -> {inputs} d", P(AXIS, *rest))
    return (kernel, W(f"{source}.bias", f"{target}.bias", "d -> d"))[: 1 + bias]


def attention(
    source: str,
    target: str,
    *,
    out: str = "o_proj",
    fused: str | None = None,
    bias: bool = True,
    out_bias: bool | None = None,
) -> tuple[W, ...]:
    """The projections of grouped-query attention into `Linears` named qkv and a `Linear` named `out`.

    HF has them as q_proj, k_proj and v_proj, or end to end in one that is called `fused`. `out_bias` is `bias` unless
    given.
    """
    outputs = (Q, K, V) if fused else ("n h", "k h", "k h")
    projections = dict(zip(("q_proj", "k_proj", "v_proj"), outputs, strict=True))
    return (
        *_linears(source, f"{target}qkv.", projections, fused, bias),
        *row_parallel(source + out, target + out, "n h", bias=bias if out_bias is None else out_bias),
    )


def grouped_qkv(source: str, target: str, *, bias: bool = True) -> tuple[W, ...]:
    """Query, key and value `Linears` that HF has in one: of each key/value head its queries, its key and its value."""
    return (
        *_column_parallel(source, f"{target}.q_proj", "(k ([n/k h] + h + h))", "n h", bias),
        *_column_parallel(source, f"{target}.k_proj", "(k (n/k h + [h] + h))", "k h", bias),
        *_column_parallel(source, f"{target}.v_proj", "(k (n/k h + h + [h]))", "k h", bias),
    )


def gated_mlp(source: str, target: str, *, fused: str | None = None, bias: bool = True) -> tuple[W, ...]:
    """down_proj(act(gate_proj(x)) · up_proj(x)), with `Linears` named gate_up; `fused` as in `attention`."""
    projections = dict(gate_proj=GATE, up_proj=UP) if fused else dict(gate_proj="f", up_proj="f")
    return (
        *_linears(source, f"{target}gate_up.", projections, fused, bias),
        *row_parallel(f"{source}down_proj", f"{target}down_proj", "f", bias=bias),
    )


def alibi(target: str) -> W:
    """The slopes of ALiBi, by head."""
    return W(alibi_slopes, target, "n -> n", P(AXIS))


def alibi_slopes(config: Any) -> np.ndarray:
    """2^(-8i/n) for i = 1 … n, float32 [n], where n is a power of two (Press et al., arXiv:2108.12409).

    Otherwise, as the paper's code has it, those of the largest power of two p below n, then every second one of 2p.
    """
    n = config.sizes["n"]
    p = 1 << (n.bit_length() - 1)
    i = np.concatenate([np.arange(1, p + 1), np.arange(1, 2 * (n - p) + 1, 2) / 2])
    return np.exp2(-8 * i / p).astype(np.float32)


def _column_parallel(source: str, target: str, axis: str, letters: str, bias: bool) -> tuple[W, ...]:
    rest = [None] * (len(letters.split()) - 1)
    kernel = W(f"{source}.weight", f"{target}.kernel", f"{axis} d -> d {letters}", P(None, AXIS, *rest))
    return (kernel, W(f"{source}.bias", f"{target}.bias", f"{axis} -> {letters}", P(AXIS, *rest)))[: 1 + bias]


def _linears(source: str, target: str, projections: dict[str, str], fused: str | None, bias: bool) -> list[W]:
    return [
        row
        for name, outputs in projections.items()
        for row in column_parallel(source + (fused or name), target + name, outputs, bias=bias)
    ]


def _axis(letters: str) -> str:
    return f"({letters})" if " " in letters else letters
