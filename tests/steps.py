"""Inputs of programs and state tables, for tests that run them without an engine."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jx_neuron.nn.layout import KV, Kept, Layout, S
from jx_neuron.nn.state import State
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
    windows: Sequence[int | None] | None = None,
) -> State:
    """A state table whose arrays are of `shape`, [z, *axes], and hold `fill`, which is 0 unless it is of float32.

    Positions are the third of `shape`, the axis s of KV; layers of `windows` keep so many of them.
    """
    sizes = tuple(tuple(shape[1:]) for _ in rows)
    windows = [None] * layers if windows is None else windows
    kept = [Kept(tuple(rows), sizes, window) for window in windows]
    return filled(layout, kept, shape[0], shape[2] if len(shape) > 2 else 0, dtype, fill)


def filled(
    layout: Layout, layers: Sequence[Kept], slots: int, positions: int, dtype: str = "float32", fill: float = 0.0
) -> State:
    """A state table of `layers` that holds `fill`."""
    state = State.abstract(layers, slots, positions, jnp.dtype(dtype), layout)
    arrays = jax.tree.map(lambda leaf: jnp.full(leaf.shape, fill, leaf.dtype), state.arrays)
    return dataclasses.replace(state, arrays=arrays, token_z=jnp.zeros(slots, jnp.int32))
