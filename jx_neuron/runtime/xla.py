"""Runs steps through `jax.jit`, on a CPU, a GPU, or the Neuron PJRT plugin."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jx_neuron.checkpoint.weights import Source
from jx_neuron.lowering import _jaxlib
from jx_neuron.models import Decoder
from jx_neuron.nn import sharding
from jx_neuron.nn.sharding import AXIS
from jx_neuron.nn.state import State
from jx_neuron.runtime import xla_options
from jx_neuron.runtime.cpu.kernel import Formulation
from jx_neuron.runtime.cpu.weights import OneCPU
from jx_neuron.runtime.gpu import OneGPU
from jx_neuron.runtime.sharded import Sharded
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.step.step import inputs
from jx_neuron.step.step_input import StepInput, StepOutput
from jx_neuron.util.pages import check_memory, gc_paused, release_memory
from jx_neuron.util.progress import track

MOST_PROGRAMS = 128
"""Programs that a model keeps. One takes 2 to 5 MB, and 160 of the 65530 memory maps that Linux allows a process."""


def mesh(tp_degree: int) -> Mesh:
    """A mesh over JAX's devices, or over CPU devices of this package's own client where JAX has too few CPU devices.

    Raises InputError where JAX has too few devices of another kind.
    """
    if jax.distributed.is_initialized():
        sharding.request_devices(-(-tp_degree // _jaxlib.processes()))
        return sharding.mesh(tp_degree, sharding.spread(jax.devices(), tp_degree))
    devices = jax.devices()
    if len(devices) < tp_degree and devices[0].platform == "cpu":
        devices = _jaxlib.client(tp_degree).devices()
    return sharding.mesh(tp_degree, devices)


class XlaRuntime:
    """Compiles programs on demand, and keeps the `MOST_PROGRAMS` that were used last.

    The state table has the size of the last `reset`, and grows with the slots and positions that steps need.
    """

    programs = None

    def __init__(self, decoder: Decoder, source: Source, mesh: Mesh, dtype: Any):
        xla_options.keep_between_processes()
        self.decoder, self.mesh, self.dtype = decoder, mesh, jnp.dtype(dtype)
        self._platform = mesh.devices.flat[0].platform
        on_one = {"cpu": OneCPU, "gpu": OneGPU}.get(self._platform, Sharded)
        self._placed: Sharded = (on_one if mesh.size == 1 else Sharded)(decoder, source, mesh, self.dtype)
        release_memory()
        self._compiled: OrderedDict[tuple[ProgramKey, int, int], Any] = OrderedDict()
        self._state: State | None = None
        self._sizes = 0, 0
        self._verifies = False

    @property
    def formulation(self) -> Formulation | None:
        """How matrices are multiplied on one CPU; None elsewhere."""
        return self._placed.formulation

    def load(self, programs: Iterable[ProgramKey]) -> None:
        programs = list(programs)
        self._keep_before(programs)
        keys = dict.fromkeys((key, *self._sizes_for(key)) for key in programs)
        missing = [key for key in keys if key not in self._compiled]
        shown = track(missing, "compiling", len(missing)) if missing[1:] else missing
        for key in shown:  # two at once take more memory and, on two cores, as long
            self._program(*key)

    def loaded(self, program: ProgramKey) -> bool:
        return (program, *self._sizes_for(program)) in self._compiled

    def run(self, step: StepInput) -> StepOutput:
        key = step.key
        self._keep_before([key])
        state = self._table(key, int(step.arrays["slot_b"].max()) + 1 if "slot_b" in step.arrays else key.rows)
        program = self._program(key, state.slots, state.positions)
        self._state = None
        arrays = (step.arrays[name] for name in inputs(self.decoder, key, self.dtype))
        *outputs, self._state = program(self._placed.params(key), state, *arrays)
        return StepOutput(*outputs)

    def copy(self, source_n: np.ndarray, target_n: np.ndarray) -> None:
        if self._state is not None:
            state = self._grown(self._state, int(target_n.max()) + 1, 0)
            with jax.set_mesh(self.mesh):
                self._state = _copy(state, source_n, target_n)

    def clear(self, slot_n: np.ndarray) -> None:
        if self._state is not None:
            with jax.set_mesh(self.mesh):
                self._state = _clear(self._state, slot_n)

    def reset(self, slots: int, positions: int) -> None:
        self._state, self._sizes = None, (slots, positions)

    def _sizes_for(self, key: ProgramKey, slots: int = 0) -> tuple[int, int]:
        """Slots and positions of the table that the program of `key` runs on."""
        if self._state is None:
            least_slots, least_positions = self._sizes
        else:
            least_slots, least_positions = self._state.slots, self._state.positions
        return max(slots, key.rows, least_slots), max(key.positions, least_positions)

    def _table(self, key: ProgramKey, slots: int) -> State:
        slots, positions = self._sizes_for(key, slots)
        if self._state is not None:
            return self._grown(self._state, slots, positions)
        empty = self._shapes(slots, positions)
        self._check_memory(empty)
        return jax.tree.map(_zeros, empty)

    def _grown(self, state: State, slots: int, positions: int) -> State:
        slots, positions = max(slots, state.slots), max(positions, state.positions)
        if (slots, positions) == (state.slots, state.positions):
            return state
        self._check_memory(self._shapes(slots, positions))
        with jax.set_mesh(self.mesh):
            return _resize(state, slots, positions)

    def _shapes(self, slots: int, positions: int) -> State:
        return self._placed.state(slots, positions, verifies=self._verifies)

    def _keep_before(self, programs: Iterable[ProgramKey]) -> None:
        """Has the table keep what was before a draft, once programs verify some and where layers are recurrent."""
        if self._verifies or self.decoder.window != 0 or all(key.kind != "verify" for key in programs):
            return
        self._verifies = True
        self._compiled.clear()
        if self._state is not None:
            table = self._shapes(self._state.slots, self._state.positions)
            self._check_memory(table)
            with jax.set_mesh(self.mesh):
                self._state = jax.jit(lambda state: state.with_rows_of(table), donate_argnums=0)(self._state)

    def _check_memory(self, table: State) -> None:
        if self._platform == "cpu":
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(table))
            check_memory(size, f"the keys and values of {table.slots} rows and {table.positions} positions take")

    def _program(self, key: ProgramKey, slots: int, positions: int) -> Any:
        """The program of `key` over a table of `slots` and `positions`."""
        sizes = key, slots, positions
        program = self._compiled.get(sizes) or self._compile(*sizes)
        self._compiled[sizes] = program
        self._compiled.move_to_end(sizes)
        while len(self._compiled) > MOST_PROGRAMS:
            self._compiled.popitem(last=False)
        return program

    def _compile(self, key: ProgramKey, slots: int, positions: int) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        split = NamedSharding(self.mesh, PartitionSpec(*[None] * (2 if key.gives_every else 1), AXIS))
        state = self._shapes(slots, positions)
        program = jax.jit(
            self._placed.step(key),
            donate_argnums=1,
            out_shardings=(everywhere, split, *[everywhere] * bool(key.taps), jax.tree.map(_sharding, state)),
            compiler_options=xla_options.options(
                self._platform, self._placed.formulation, key.rows * key.tokens, self._placed.codes
            ),
        )
        layouts = inputs(self.decoder, key, self.dtype).values()
        arrays = [jax.ShapeDtypeStruct(*layout, sharding=everywhere) for layout in layouts]
        release_memory()
        with jax.set_mesh(self.mesh), xla_options.precision(self._platform, self.dtype):
            with gc_paused():
                lowered = program.lower(self._placed.params(key), state, *arrays)
            executable = lowered.compile()
        release_memory()
        return executable


def _zeros(leaf: Any) -> jax.Array:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: np.zeros(shape, leaf.dtype))


def _sharding(leaf: Any) -> Any:
    return leaf.sharding


_copy = jax.jit(State.copy, donate_argnums=0)
_clear = jax.jit(State.clear, donate_argnums=0)
_resize = jax.jit(State.resize, static_argnums=(1, 2))
