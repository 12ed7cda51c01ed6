"""Programs that rules of the verifier are for, as modules of HLO."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.graph import parse

try:
    from jaxlib._hlo import hlo_module_from_text
except ImportError:
    from jaxlib._jax import hlo_module_from_text


def text(body: str, header: str = "", before: str = "") -> bytes:
    """The module whose entry computation has these instructions, one a line."""
    module = hlo_module_from_text(f"HloModule m{header}\n{before}\nENTRY main {{\n{body}\n}}\n")
    return small_ids(module.as_serialized_hlo_module_proto())


def edited(module: bytes, edit: Callable[[Any], None]) -> bytes:
    message = proto.parse(module)
    edit(message)
    return proto.serialize(message)


def small_ids(module: bytes) -> bytes:
    """The same with instructions and computations numbered from 1 on, as neuronx-cc's reader wants them."""

    def renumber(m: Any) -> None:
        computations = {c.id: n for n, c in enumerate(m.computations, 1)}
        ids = {i.id: n for n, i in enumerate(proto.instructions(m), 1)}
        m.entry_computation_id = computations[m.entry_computation_id]
        for c in m.computations:
            c.id, c.root_id = computations[c.id], ids[c.root_id]
            for i in c.instructions:
                i.id = ids[i.id]
                i.operand_ids[:] = [ids[n] for n in i.operand_ids]
                i.called_computation_ids[:] = [computations[n] for n in i.called_computation_ids]

    return edited(module, renumber)


def traced(fn: Callable[..., Any], *args: Any, raw: bool = False, **options: Any) -> bytes:
    module = jax.jit(fn, **options).lower(*args).compiler_ir("hlo").as_serialized_hlo_module_proto()
    return module if raw else small_ids(module)


def f32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def s32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def one(opcode: str, dtype: str, extra: str = "", operands: int = 2) -> bytes:
    """A program of one instruction, %it, on parameters of its own type."""
    names = ", ".join(f"p{n}" for n in range(operands))
    lines = [f"p{n} = {dtype}[4,4] parameter({n})" for n in range(operands)]
    return text("\n".join([*lines, f"ROOT it = {dtype}[4,4] {opcode}({names}){extra}"]))


def combiner(dtype: str, opcode: str = "add") -> str:
    return f"""combine {{
      a = {dtype}[] parameter(0)
      b = {dtype}[] parameter(1)
      ROOT r = {dtype}[] {opcode}(a, b)
    }}"""


def collective(opcode: str, dtype: str, result: str = "4", extra: str = ", replica_groups={{0,1}}") -> bytes:
    body = f"p = {dtype}[4] parameter(0)\nROOT it = {dtype}[{result}] {opcode}(p){extra}, to_apply=combine"
    module = text(body, before=combiner(dtype))

    def legacy_groups(m: Any) -> None:
        for i in proto.instructions(m):
            if i.HasField("collective_device_list") and not i.replica_groups:
                i.replica_groups.extend(i.collective_device_list.replica_groups)

    return edited(module, legacy_groups)


def typed(dtype: str) -> bytes:
    """A program that casts to a type and back."""
    return text(f"p = f32[4] parameter(0)\nit = {dtype}[4] convert(p)\nROOT r = f32[4] convert(it)")


def scatter(dtype: str, opcode: str | None) -> bytes:
    update = (
        combiner(dtype, opcode)
        if opcode
        else f"""combine {{
      a = {dtype}[] parameter(0)
      ROOT b = {dtype}[] parameter(1)
    }}"""
    )
    body = f"""p = {dtype}[8] parameter(0)
      n = s32[2,1] parameter(1)
      u = {dtype}[2] parameter(2)
      ROOT it = {dtype}[8] scatter(p, n, u), to_apply=combine, update_window_dims={{}}, inserted_window_dims={{0}},
        scatter_dims_to_operand_dims={{0}}, index_vector_dim=1"""
    return text(body, before=update)


def neuron_top_k(k: int, dtype: str = "f32", indices: str = "") -> bytes:
    shape = f"({dtype}[2,{k}], u32[2,{indices or k}])"
    return text(f"""p = {dtype}[2,32768] parameter(0)
      ROOT it = {shape} custom-call(p), custom_call_target="AwsNeuronTopK", backend_config="{k}" """)


def transposed_top_k(dims: str) -> bytes:
    return text(f"""p = f32[4,8] parameter(0)
      ROOT it = (f32[{dims}], u32[{dims}]) custom-call(p), custom_call_target="AwsNeuronTopK", backend_config="2" """)


def custom_call(target: str) -> bytes:
    return text(f'p = f32[4] parameter(0)\nROOT it = f32[4] custom-call(p), custom_call_target="{target}"')


def sort(direction: str) -> bytes:
    order = f"""order {{
      a = f32[] parameter(0)
      b = f32[] parameter(1)
      ROOT r = pred[] compare(a, b), direction={direction}
    }}"""
    return text("p = f32[8] parameter(0)\nROOT it = f32[8] sort(p), dimensions={0}, to_apply=order", before=order)


def convolution(**window: tuple[int, int]) -> bytes:
    x, w = f32(1, 16, 16, 3), f32(3, 3, 3, 8)
    strides = window.pop("strides", (1, 1))
    return traced(
        lambda x, w: lax.conv_general_dilated(
            x, w, strides, ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"), **window
        ),
        x,
        w,
    )


def pool(**dilation: tuple[int, int]) -> bytes:
    return traced(lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "VALID", **dilation), f32(8, 8))


def gather(n: int) -> bytes:
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    return traced(
        lambda x: lax.gather(x, lax.iota(jnp.int32, n).reshape(n, 1), numbers, (1, 4), mode="promise_in_bounds"),
        f32(3, 4),
    )


def scatter_rows(n: int) -> bytes:
    numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    return traced(
        lambda x, u: lax.scatter(x, lax.iota(jnp.int32, n).reshape(n, 1), u, numbers, mode="promise_in_bounds"),
        f32(3, 4),
        f32(n, 4),
    )


def conditional(x: jax.Array) -> jax.Array:
    return lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)


def callback(x: jax.Array) -> jax.Array:
    jax.debug.callback(lambda _: None, x)
    return x + 1


def read_after_write(after: bool) -> bytes:
    """A cache that is written in place, and read anew or as it was; the old one may be read before the write."""

    def step(cache: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        written = lax.dynamic_update_slice(cache, x + jnp.sum(cache, 0, keepdims=True), (0, 0))
        seen = jnp.sum(written)
        return written, jnp.dot(cache, jnp.full((4,), seen)) if after else jnp.dot(written, jnp.full((4,), seen))

    return inlined(step, f32(8, 4), f32(1, 4), donate_argnums=0)


def inlined(fn: Callable[..., Any], *args: Any, **options: Any) -> bytes:
    module = traced(fn, *args, **options)
    assert all(i.opcode != "call" for i in parse(module).instructions)
    return module


def donated(shape: jax.ShapeDtypeStruct) -> bytes:
    return edited(
        text("cache = f32[8,4] parameter(0)\nROOT it = f32[4,4] slice(cache), slice={[0:4], [0:4]}")
        if shape.shape == (4, 4)
        else text(
            "cache = f32[8,4] parameter(0)\nn = f32[8,4] negate(cache)\nROOT it = (f32[8,4]) tuple(n)",
            ", input_output_alias={ {0}: (0, {}, must-alias) }",
        ),
        lambda m: m.buffer_donor.entries.add(parameter_number=0),
    )


def attention(t: int) -> bytes:
    """Products whose intermediate result is t x t."""
    return traced(lambda q, k, v: (q @ k.T) @ v, f32(t, 64), f32(t, 64), f32(t, 64))


def turns(n: int) -> bytes:
    """n turns of two engine instructions: a counter's step and a sine."""
    return traced(lambda x: lax.fori_loop(0, n, lambda i, c: jnp.sin(c), x), f32(4))


def channel(given: int) -> bytes:
    def edit(m: Any) -> None:
        proto.root(proto.entry(m)).channel_id = given

    return edited(collective("all-reduce", "f32"), edit)


def groups(*ranks: list[int], listed: bool = False) -> bytes:
    def edit(m: Any) -> None:
        i = proto.root(proto.entry(m))
        del i.replica_groups[:]
        i.ClearField("collective_device_list")
        field = i.collective_device_list.replica_groups if listed else i.replica_groups
        for group in ranks:
            field.add(replica_ids=group)

    return edited(collective("all-reduce", "f32"), edit)


def with_id(n: int) -> bytes:
    def edit(m: Any) -> None:
        c = proto.entry(m)
        proto.root(c).id = c.root_id = n

    return edited(one("add", "f32"), edit)


def mask(value: float) -> bytes:
    return traced(lambda m, x: jnp.where(m, x, jnp.bfloat16(value)), *(
        jax.ShapeDtypeStruct((4,), d) for d in (jnp.bool_, jnp.bfloat16)
    ))  # fmt: skip


def wrong_add(dims: str) -> bytes:
    def edit(m: Any) -> None:
        proto.root(proto.entry(m)).shape.dimensions[:] = [int(n) for n in dims.split(",")]

    return edited(one("add", "f32"), edit)


def draw(implementation: str) -> Callable[[Any], jax.Array]:
    def fn(data: Any) -> jax.Array:
        return jax.random.uniform(jax.random.wrap_key_data(data, impl=implementation), (8,))

    return fn


def rng(algorithm: str) -> bytes:
    return text(f"""p = u64[2] parameter(0)
      ROOT it = (u64[2], u32[8]) rng-bit-generator(p), algorithm={algorithm}""")
