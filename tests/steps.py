"""Inputs of programs and state tables, for tests that run them without an engine."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jx_neuron.nn.state import KV, Layout, S, State
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step_input import StepInput


def step_input(
    key: ProgramKey, rows: Sequence[Sequence[int]], start_b: Sequence[int] | None = None, slot_b: Sequence[int] = ()
) -> StepInput:
    """A step over `rows` of tokens from start_b on (0 by default), in slots 0, 1, … unless `slot_b` names them.

    A row longer than the program's tokens is a prompt of which its first chunk goes through.
    """
    tokens_bt = np.zeros((key.rows, key.tokens), np.int32)
    for row, tokens in zip(tokens_bt, rows, strict=True):
        row[: len(tokens)] = tokens[: key.tokens]
    values = dict(
        tokens_bt=tokens_bt,
        slot_b=slot_b or range(key.rows),
        start_b=start_b if start_b is not None else [0] * key.rows,
        length_b=[len(row) for row in rows],
        temperature_b=[1.0] * key.rows,
        top_k_b=[1] * key.rows,
        top_p_b=[1.0] * key.rows,
        uniform_b=[0.5] * key.rows,
    )
    return StepInput(key, {name: np.asarray(values[name], dtype) for name, (_, dtype) in key.inputs().items()})


def table(
    layout: Layout,
    shape: Sequence[int],
    rows: Sequence[S] = KV,
    dtype: str = "float32",
    layers: int = 2,
    fill: float = 0.0,
) -> State:
    """A state table whose arrays are of `shape`, [z, *axes], and hold `fill`, which is 0 unless it is of float32."""
    shapes = layout.abstract(rows, [shape] * len(rows), layers, jnp.dtype(dtype))
    arrays = jax.tree.map(lambda leaf: jnp.full(leaf.shape, fill, leaf.dtype), shapes)
    return State(arrays, jnp.zeros(shape[0], jnp.int32), tuple(rows), layout, jnp.dtype(dtype))
