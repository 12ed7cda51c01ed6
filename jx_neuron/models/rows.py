"""Rows of weight tables that families share: HF's name of a module, and the letters of its axes.

A row's target is HF's name without the prefix of its base model, with `layers.{i}.` for blocks whatever HF calls their
list: `model.norm` fills `norm`, and `transformer.h.{i}.ln_1` fills `layers.{i}.ln_1`. Where our module is called
otherwise, `target` is its path.

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
    "gated_attention",
    "gated_mlp",
    "grouped_qkv",
    "head_bias",
    "heads_rms_norm",
    "key_head_numbers",
    "layer_norm",
    "mlp",
    "ours",
    "position_embedding",
    "rms_norm",
    "row_parallel",
]

Q, K, V = "[n h] + k h + k h", "n h + [k h] + k h", "n h + k h + [k h]"  # of a fused projection
GATE, UP = "[f] + f", "f + [f]"


def embedding(source: str, target: str | None = None, *, width: str = "d") -> W:
    """A table of the vocabulary, or a head."""
    return W(f"{source}.weight", f"{target or ours(source)}.embedding", f"v {width} -> v {width}", P(AXIS, None))


def head_bias(source: str, target: str) -> W:
    """What is added to the logits."""
    return W(f"{source}.bias", target, "v -> v", P(AXIS))


def position_embedding(source: str, target: str | None = None) -> W:
    """A table of positions."""
    return W(f"{source}.weight", f"{target or ours(source)}.embedding", "s d -> s d")


def rms_norm(source: str, target: str | None = None, *, width: str = "d") -> W:
    """A scale over the model's width, or each head's, "h"."""
    return W(f"{source}.weight", f"{target or ours(source)}.scale", f"{width} -> {width}")


def heads_rms_norm(source: str, target: str | None = None, *, heads: str) -> W:
    """The scale of a norm over all query heads, "n", or key heads, "k", together."""
    return W(f"{source}.weight", f"{target or ours(source)}.scale", f"({heads} h) -> {heads} h", P(AXIS, None))


def key_head_numbers(target: str) -> W:
    """1, 2, … for the key heads, which copies of a head share (`head_copies`), and 0 for padding."""
    return W(_key_head_numbers, target, "k -> k", P(AXIS))


def _key_head_numbers(config: Any) -> np.ndarray:
    return np.arange(1, config.sizes["k"] + 1, dtype=np.float32)


def layer_norm(source: str, target: str | None = None, *, width: str = "d", bias: bool = True) -> tuple[W, ...]:
    """Scale and bias over the model's width, or each head's, "h"."""
    target = target or ours(source)
    scale = rms_norm(source, target, width=width)
    return (scale, W(f"{source}.bias", f"{target}.bias", f"{width} -> {width}"))[: 1 + bias]


def column_parallel(source: str, target: str, outputs: str, *, inputs: str = "d", bias: bool = True) -> tuple[W, ...]:
    """A torch Linear from `inputs` to `outputs`, such as "n h", whose first axis is split; "[f] + f" takes a part of
    one."""
    letters = outputs.partition("[")[2].partition("]")[0] or outputs
    return _column_parallel(source, target, _axis(outputs), letters, bias, inputs)


def row_parallel(source: str, target: str, inputs: str, *, bias: bool = True) -> tuple[W, ...]:
    """A torch Linear from `inputs`, such as "n h", whose first axis is split, to "d"."""
    rest = [None] * len(inputs.split())
    kernel = W(f"{source}.weight", f"{target}.kernel", f"d {_axis(inputs)} -> {inputs} d", P(AXIS, *rest))
    return (kernel, W(f"{source}.bias", f"{target}.bias", "d -> d"))[: 1 + bias]


def attention(
    source: str,
    target: str | None = None,
    *,
    out: str = "o_proj",
    fused: str | None = None,
    grouped: str | None = None,
    inputs: str = "d",
    bias: bool = True,
    out_bias: bool | None = None,
) -> tuple[W, ...]:
    """The projections of jx_neuron.nn.sublayers.Attention, from `inputs` and to "d".

    HF has q_proj, k_proj and v_proj, or one module: `fused` has them end to end, and `grouped` has of each key/value
    head its queries, its key and its value. `out` is HF's name of o_proj. `out_bias` is `bias` unless given.
    """
    target = target or ours(source)
    if grouped:
        qkv = grouped_qkv(f"{source}.{grouped}", f"{target}.qkv", bias=bias)
    else:
        outputs = (Q, K, V) if fused else ("n h", "k h", "k h")
        projections = dict(zip(("q_proj", "k_proj", "v_proj"), outputs, strict=True))
        qkv = _linears(source, f"{target}.qkv", projections, fused, bias, inputs)
    out_bias = bias if out_bias is None else out_bias
    return (*qkv, *row_parallel(f"{source}.{out}", f"{target}.o_proj", "n h", bias=out_bias))


def grouped_qkv(source: str, target: str, *, bias: bool = True) -> tuple[W, ...]:
    """Query, key and value `Linears` that HF has in one: of each key/value head its queries, its key and its value."""
    return (
        *_column_parallel(source, f"{target}.q_proj", "(k ([n/k h] + h + h))", "n h", bias),
        *_column_parallel(source, f"{target}.k_proj", "(k (n/k h + [h] + h))", "k h", bias),
        *_column_parallel(source, f"{target}.v_proj", "(k (n/k h + h + [h]))", "k h", bias),
    )


def gated_attention(source: str, target: str | None = None, *, bias: bool = True) -> tuple[W, ...]:
    """The projections of jx_neuron.nn.sublayers.GatedAttention; HF's q_proj has of each head its query and its gate."""
    target = target or ours(source)
    return (
        *_column_parallel(f"{source}.q_proj", f"{target}.qkv.q_proj", "(n ([h] + h))", "n h", bias),
        *_column_parallel(f"{source}.q_proj", f"{target}.gate_proj", "(n (h + [h]))", "n h", bias),
        *(row for row in attention(source, target, bias=bias) if ".q_proj." not in row.target),
    )


def gated_mlp(source: str, target: str | None = None, *, fused: str | None = None, bias: bool = True) -> tuple[W, ...]:
    """The projections of jx_neuron.nn.sublayers.GatedMLP; HF may have gate_proj and up_proj in one, called `fused`."""
    target = target or ours(source)
    projections = dict(gate_proj=GATE, up_proj=UP) if fused else dict(gate_proj="f", up_proj="f")
    return (
        *_linears(source, f"{target}.gate_up", projections, fused, bias),
        *row_parallel(f"{source}.down_proj", f"{target}.down_proj", "f", bias=bias),
    )


def mlp(
    source: str, target: str | None = None, *, up: str = "up_proj", down: str = "down_proj", bias: bool = True
) -> tuple[W, ...]:
    """The projections of jx_neuron.nn.sublayers.MLP; `up` and `down` are HF's names of up_proj and down_proj."""
    target = target or ours(source)
    return (
        *column_parallel(f"{source}.{up}", f"{target}.up_proj", "f", bias=bias),
        *row_parallel(f"{source}.{down}", f"{target}.down_proj", "f", bias=bias),
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


def _column_parallel(source: str, target: str, axis: str, letters: str, bias: bool, inputs: str = "d") -> tuple[W, ...]:
    rest = [None] * (len(letters.split()) - 1)
    kernel = W(f"{source}.weight", f"{target}.kernel", f"{axis} {inputs} -> {inputs} {letters}", P(None, AXIS, *rest))
    return (kernel, W(f"{source}.bias", f"{target}.bias", f"{axis} -> {letters}", P(AXIS, *rest)))[: 1 + bias]


def _linears(
    source: str, target: str, projections: dict[str, str], fused: str | None, bias: bool, inputs: str = "d"
) -> tuple[W, ...]:
    return tuple(
        row
        for name, outputs in projections.items()
        for row in column_parallel(f"{source}.{fused or name}", f"{target}.{name}", outputs, inputs=inputs, bias=bias)
    )


def ours(source: str) -> str:
    """The path of a module that HF calls `source`."""
    _, of_layer, name = source.partition("{i}.")
    return f"layers.{{i}}.{name}" if of_layer else source.partition(".")[2] or source


def _axis(letters: str) -> str:
    return f"({letters})" if " " in letters else letters
