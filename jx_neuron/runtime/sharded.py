"""A model on several devices, or on a chip: its parameters are arrays sharded over a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from jx_neuron.checkpoint.weights import Params, Source
from jx_neuron.models import Decoder
from jx_neuron.nn.ops import Ops, using
from jx_neuron.nn.state import State
from jx_neuron.runtime.cpu.kernel import Formulation
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step import step


class Sharded:
    """A decoder's parameters, sharded over a mesh, and its steps."""

    formulation: Formulation | None = None
    """How one CPU multiplies; None elsewhere."""

    codes: Sequence[Formulation] = ()
    """How one CPU multiplies quantized matrices, of each kind that there are."""

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: np.dtype[Any]):
        self._decoder, self._mesh, self._dtype = decoder, mesh, dtype
        self._params = self._place(source)

    @property
    def ops(self) -> Ops:
        """The equations that its steps are traced with."""
        return Ops(cores=self._mesh.size)

    def _place(self, source: Source) -> Params:
        if self._mesh.is_multi_process:
            return source.place_own(self._mesh, self._decoder.abstract_params(self._dtype, self._mesh))
        return source.place(self._mesh)

    def state(self, slots: int, positions: int, *, verifies: bool) -> State:
        """A state table as ShapeDtypeStructs; one that `verifies` keeps what was before a draft."""
        decoder = self._decoder.with_drafts() if verifies else self._decoder
        return decoder.abstract_state(slots, positions, self._dtype, self._mesh)

    def params(self, key: ProgramKey) -> Params:
        """The parameters that the step of `key` takes."""
        return self._params

    def step(self, key: ProgramKey) -> Callable[..., tuple[Any, ...]]:
        """The step of `key`, over `params(key)`."""
        traced = step(self._decoder_of(key), key)

        def run(params: Params, state: State, *inputs: Array) -> tuple[Any, ...]:
            with using(self.ops):
                return traced(params, state, *inputs)

        return run

    def _decoder_of(self, key: ProgramKey) -> Decoder:
        """The decoder that binds `params(key)`."""
        return self._decoder
