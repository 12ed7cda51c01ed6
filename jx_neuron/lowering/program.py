"""A JAX function → the program of one core, ready for neuronx-cc and for the host."""

from __future__ import annotations

import functools
import inspect
import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jx_neuron.errors import InputError, LoweringError
from jx_neuron.lowering import _jaxlib, cost
from jx_neuron.lowering.execute import Executable
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.legalize.passes import legalize
from jx_neuron.lowering.partition import partition
from jx_neuron.lowering.signature import Kind, ProgramSpec, TensorSpec
from jx_neuron.lowering.specs import (
    alias_donated,
    input_labels,
    output_labels,
    shardings,
    spread,
    tensor_specs,
)
from jx_neuron.lowering.verify.checking import Violation, verify
from jx_neuron.nn.sharding import AXIS

__all__ = ["Program", "ProgramSpec", "TensorSpec", "Traced", "compile_py_func", "lower", "lower_many", "trace"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Program(ProgramSpec):
    """The program that each core runs.

    Attributes:
        name, mesh, tp_degree, inputs, outputs: as of `ProgramSpec`.
        hlo_module: a serialized HloModuleProto, legalized for neuronx-cc.
        sources: HLO instruction name → file:line, where known.
        seconds: how long tracing and lowering took.
    """

    hlo_module: bytes = field(repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    seconds: float = field(default=0.0, repr=False, compare=False)

    def as_text(self) -> str:
        """The HLO as XLA prints it."""
        return _jaxlib.hlo_text(self.hlo_module)

    def collectives(self) -> list[cost.Collective]:
        """Every collective, in order."""
        return cost.collectives(self.hlo_module)

    def cost(self) -> cost.Cost:
        """FLOPs and memory traffic of one run on one core; `jx_neuron.lowering.cost` states the model."""
        return cost.cost(self.hlo_module)

    def verify(self, target: str, *, lnc: int | None = None) -> list[Violation]:
        """Every violation of what neuronx-cc is documented to refuse, with the line of source where known.

        Args:
            target: inf2, trn1, trn1n, trn2 or trn3.
            lnc: logical-core configuration; None is the target's default.
        """
        violations = verify(self.hlo_module, target, lnc=lnc)
        return [replace(v, source=v.source or self.sources.get(v.instruction or "")) for v in violations]

    def run(self, *args: Any) -> list[np.ndarray[Any, Any]]:
        """Runs it on the host, one CPU device a core.

        Args:
            args: the inputs as whole arrays, pytrees of them as they were lowered; no rank.

        Returns:
            The outputs as whole arrays, in order.

        Raises:
            InputError: an array is not what the program takes.
        """
        leaves = jax.tree.leaves(args)
        specs = [spec for spec in self.inputs if spec.kind != "rank"]
        if len(leaves) != len(specs):
            raise InputError(f"{self.name} takes {len(specs)} arrays ({len(leaves)} given)")
        executable = _executable(self.hlo_module, self.tp_degree)
        arrays = []
        for spec, leaf in zip(specs, leaves, strict=True):
            array = np.asarray(leaf, jnp.result_type(leaf))
            if (array.shape, array.dtype.name) != (spec.global_shape(self.tp_degree), spec.dtype):
                expected = f"{spec.dtype}{list(spec.global_shape(self.tp_degree))}"
                raise InputError(
                    f"{self.name}: {spec.name} is {array.dtype}{list(array.shape)}, and must be {expected}"
                )
            arrays.append(jax.device_put(array, executable.sharding(spec.partition)))
        if len(specs) < len(self.inputs):
            ranks = np.arange(self.tp_degree, dtype=np.int32)
            arrays.append(jax.device_put(ranks, executable.sharding(self.inputs[-1].partition)))
        outputs = executable.execute(arrays)
        return [_whole(shards, spec) for shards, spec in zip(outputs, self.outputs, strict=True)]


@functools.lru_cache(maxsize=4)
def _executable(hlo_module: bytes, tp_degree: int) -> Executable:
    return Executable(hlo_module, tp_degree)


def _whole(shards: list[jax.Array], spec: TensorSpec) -> np.ndarray[Any, Any]:
    if spec.split_axis is None:
        return np.asarray(shards[0])
    return np.concatenate([np.asarray(s) for s in shards], axis=spec.split_axis)


@dataclass(frozen=True)
class Traced(ProgramSpec):
    """A traced function, not yet partitioned: StableHLO with shardings, independent of the function.

    Tracing took `seconds`. Partitioning may add an input of kind "rank".
    """

    stablehlo: bytes = field(repr=False)
    seconds: float = field(default=0.0, repr=False, compare=False)

    def lower(self) -> Program:
        """Partitions and legalizes it.

        Raises:
            LoweringError: XLA cannot partition it.
        """
        began = time.perf_counter()
        aliases = {n: spec.alias for n, spec in enumerate(self.outputs) if spec.alias is not None}
        whole = [n for n, spec in enumerate(self.inputs) if spec.split_axis is None]
        partitioned = partition(self.stablehlo, self.tp_degree)
        legalized = legalize(partitioned, self.tp_degree, self.name, aliases, whole)
        module = proto.parse(legalized.hlo_module)
        inputs = self.inputs
        if legalized.takes_rank:
            inputs += (TensorSpec("rank", "rank", (1,), "int32", tuple(self.mesh)),)
        program = Program(self.name, self.mesh, inputs, self.outputs, legalized.hlo_module, legalized.sources)
        _check_shapes(program, module)
        return replace(program, seconds=self.seconds + time.perf_counter() - began)


def _check_shapes(program: Program, module: Any) -> None:
    main = proto.entry(module)
    for specs, shapes in (
        (program.inputs, [p.shape for p in proto.parameters(main)]),
        (program.outputs, proto.leaves(proto.root(main).shape)),
    ):
        stated = [(s.dtype, s.shape) for s in specs]
        if stated != [(proto.dtype(s), tuple(s.dimensions)) for s in shapes]:
            partitioned = ", ".join(map(proto.describe, shapes))
            raise LoweringError(f"{program.name}: partitioned to ({partitioned}), where the specs give {stated}")


def trace(
    fn: Function,
    *args: Any,
    tp_degree: int = 1,
    in_specs: Sequence[Any] | None = None,
    out_specs: Any = None,
    donate_argnums: Sequence[int] = (),
    name: str | None = None,
    input_kinds: Sequence[Kind] | None = None,
    input_names: Sequence[str] | None = None,
) -> Traced:
    """The first half of `lower`: everything that needs `fn`. Same arguments, same errors."""
    began = time.perf_counter()
    if tp_degree < 1:
        raise LoweringError(f"tp_degree={tp_degree}: it counts cores, and is at least 1")
    name = name or getattr(fn, "__name__", "program").replace("<lambda>", "program")
    mesh = {AXIS: tp_degree}
    devices = AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    abstract = jax.tree.map(_abstract, args)
    in_axes = spread("in_specs", (None,) * len(args) if in_specs is None else tuple(in_specs), abstract, mesh)
    kinds = input_kinds or ["state" if n in donate_argnums else "input" for n in range(len(args))]
    inputs = tensor_specs(abstract, in_axes, mesh, input_labels(fn, abstract, kinds, input_names))
    owners = [n for n, arg in enumerate(abstract) for _ in jax.tree.leaves(arg)]
    donated = [n for n, owner in enumerate(owners) if owner in donate_argnums]
    call = _named(fn, name)
    with jax.sharding.use_abstract_mesh(devices):
        result = jax.tree.map(_abstract, jax.jit(call, keep_unused=True).trace(*abstract).out_info)
        out_axes = spread("out_specs", out_specs, result, mesh)
        outputs = alias_donated(inputs, donated, tensor_specs(result, out_axes, mesh, output_labels(result)))
        lowered = (
            jax.jit(
                call,
                in_shardings=shardings(devices, in_axes),
                out_shardings=shardings(devices, out_axes),
                keep_unused=True,
            )
            .trace(*abstract)
            .lower(lowering_platforms=("cpu",))
        )
    code = io.BytesIO()
    lowered.compiler_ir("stablehlo").operation.write_bytecode(code)
    seconds = time.perf_counter() - began
    return Traced(name, mesh, tuple(inputs), tuple(outputs), code.getvalue(), seconds)


def lower(
    fn: Function,
    *args: Any,
    tp_degree: int = 1,
    in_specs: Sequence[Any] | None = None,
    out_specs: Any = None,
    donate_argnums: Sequence[int] = (),
    name: str | None = None,
    input_kinds: Sequence[Kind] | None = None,
    input_names: Sequence[str] | None = None,
) -> Program:
    """Lowers a JAX function to what one of `tp_degree` cores runs. No device is needed, and no values.

    >>> from jax.sharding import PartitionSpec as P
    >>> def mlp(x, up, down):
    ...     return jax.nn.relu(x @ up) @ down
    >>> shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 8), (8, 32), (32, 8))]
    >>> program = lower(mlp, *shapes, tp_degree=4, in_specs=(None, P(None, "tp"), P("tp")))
    >>> [(spec.name, spec.shape) for spec in program.inputs]
    [('x', (2, 8)), ('up', (8, 8)), ('down', (8, 8))]
    >>> [(collective.opcode, collective.shape) for collective in program.collectives()]
    [('all-reduce', 'float32[2,8]')]
    >>> program.verify("trn1")
    []

    Args:
        args: pytrees of arrays, or of `jax.ShapeDtypeStruct` in their place; shapes are over all cores.
        in_specs: for each argument a PartitionSpec over the axis "tp", or a pytree of them that is a prefix of the
            argument's; None where it is on every core.
        out_specs: the same for the result.
        donate_argnums: arguments whose memory is taken by outputs. Their arrays come back one after the other, in their
            order, with the same shapes, dtypes and specs; where they could be several runs of outputs, the last one.
        name: the program's; by default the function's.
        input_kinds: "param", "state" or "input" for each argument; by default "state" where donated, else "input".
        input_names: for each array; by default the argument's name and path, for a "param" the path alone.

    Raises:
        LoweringError: an axis does not divide, a spec names another axis or does not fit the argument, XLA cannot
            partition the function, or a donated argument has no output that it can become.
    """
    return trace(
        fn,
        *args,
        tp_degree=tp_degree,
        in_specs=in_specs,
        out_specs=out_specs,
        donate_argnums=donate_argnums,
        name=name,
        input_kinds=input_kinds,
        input_names=input_names,
    ).lower()


def lower_many(traced: Iterable[Traced], workers: int = 2) -> Iterator[Program]:
    """The second half of `lower` for several programs, `workers` at a time; yields them in order.

    `traced` may be a generator: each program is begun as soon as it is traced.
    """
    pending: deque[Future[Program]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for one in traced:
                pending.append(pool.submit(one.lower))
                while pending and pending[0].done():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def compile_py_func(fn: Function, *args: Any, **options: Any) -> bytes:
    """The serialized HloModuleProto of a function, for `neuronx-cc compile --framework=XLA`.

    >>> type(compile_py_func(jnp.add, jnp.float32(1), jnp.float32(2)))
    <class 'bytes'>

    Args:
        args: as of `lower`. Where none are given, each parameter's default has to be a `jax.ShapeDtypeStruct`.
        options: of `lower`.
    """
    if not args:
        args = tuple(p.default for p in inspect.signature(fn).parameters.values())
        if any(a is inspect.Parameter.empty for a in args):
            raise LoweringError(
                f"compile_py_func needs the shapes of {getattr(fn, '__name__', fn)}: give arrays or "
                "jax.ShapeDtypeStructs after it, or make them the parameters' defaults"
            )
    return lower(fn, *args, **options).hlo_module


def _named(fn: Function, name: str) -> Function:
    def call(*args: Any) -> Any:
        return fn(*args)

    call.__name__ = call.__qualname__ = name
    return call


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
