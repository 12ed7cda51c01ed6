"""Programs lowered at every degree, run on the host, against numpy."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import InputError, LoweringError
from jx_neuron.lowering import Program, compile_py_func, lower, lower_many, trace
from jx_neuron.lowering.hlo import proto

DEGREES = (1, 2, 4, 8)
RNG = np.random.default_rng(0)
Shape = jax.ShapeDtypeStruct


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def opcodes(program: Program) -> list[str]:
    return [i.opcode for i in proto.instructions(proto.parse(program.hlo_module))]


def mlp(x_bd, up_df, down_fd):
    return jax.nn.relu(x_bd @ up_df) @ down_fd


@pytest.mark.parametrize("tp", DEGREES)
def test_column_then_row_parallel_products(tp: int) -> None:
    x_bd, up_df, down_fd = normal(4, 64), normal(64, 256), normal(256, 64)
    program = lower(mlp, x_bd, up_df, down_fd, tp_degree=tp, in_specs=(None, P(None, "tp"), P("tp")))
    (y_bd,) = program.run(x_bd, up_df, down_fd)
    np.testing.assert_allclose(y_bd, np.maximum(x_bd @ up_df, 0) @ down_fd, rtol=1e-5, atol=1e-3)
    assert [c.opcode for c in program.collectives()] == (["all-reduce"] if tp > 1 else [])
    assert [s.shape for s in program.inputs] == [(4, 64), (64, 256 // tp), (256 // tp, 64)]
    cost = program.cost()
    assert cost.flops == 2 * 2 * 4 * 64 * 256 // tp
    assert cost.bytes_read == 4 * (4 * 64 + 2 * 64 * 256 // tp)
    assert cost.bytes_written == 4 * 4 * 64
    assert cost.bytes_between == 4 * (4 * 256 // tp + 4 * 64 * (2 if tp > 1 else 1))


@pytest.mark.parametrize("tp", DEGREES)
def test_gather_from_a_split_vocabulary(tp: int) -> None:
    wte_vd, tokens_bt = normal(64, 16), np.array([[0, 63, 31], [32, 8, 7]], np.int32)
    program = lower(
        lambda wte_vd, tokens_bt: wte_vd.at[tokens_bt].get(mode="clip"),
        wte_vd, tokens_bt, tp_degree=tp, in_specs=(P("tp"), None), input_kinds=("param", "input"),
    )  # fmt: skip
    np.testing.assert_array_equal(program.run(wte_vd, tokens_bt)[0], wte_vd[tokens_bt])
    kinds = [s.kind for s in program.inputs]
    assert kinds == ["param", "input"] + (["rank"] if tp > 1 else [])
    assert "partition-id" not in opcodes(program)
    assert program.cost().bytes_read == 6 * 16 * 4 + 6 * 4 + (4 if tp > 1 else 0)


@pytest.mark.parametrize("tp", DEGREES)
def test_arguments_of_extremes_first_index_wins(tp: int) -> None:
    logits_bv = RNG.integers(-4, 4, (16, 64)).astype(np.float32)  # many ties
    logits_bv[3, 40], logits_bv[3, 50], logits_bv[5] = np.nan, np.nan, -np.inf
    program = lower(
        lambda x: (jnp.argmax(x, -1), jnp.argmin(x, -1), jnp.argmax(x.astype(jnp.int32)[:3], -1)),
        logits_bv, tp_degree=tp, in_specs=(P(None, "tp"),),
    )  # fmt: skip
    largest, smallest, of_integers = program.run(logits_bv)
    np.testing.assert_array_equal(largest, np.argmax(logits_bv, -1))
    np.testing.assert_array_equal(smallest, np.argmin(logits_bv, -1))
    np.testing.assert_array_equal(of_integers, np.argmax(logits_bv[:3].astype(np.int32), -1))
    reduces = [i for i in proto.instructions(proto.parse(program.hlo_module)) if i.opcode == "reduce"]
    assert {len(i.operand_ids) for i in reduces} == {2}


@pytest.mark.parametrize("tp", DEGREES)
def test_top_k_is_neurons_custom_call(tp: int) -> None:
    logits_bv = normal(3, 64)
    program = lower(lambda x: jax.lax.top_k(x, 5), logits_bv, tp_degree=tp, in_specs=(P(None, "tp"),))
    values, indices = program.run(logits_bv)
    expected = np.argsort(-logits_bv, axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits_bv, expected, -1))
    calls = [i for i in proto.instructions(proto.parse(program.hlo_module)) if i.opcode == "custom-call"]
    assert {(c.custom_call_target, c.backend_config) for c in calls} == {("AwsNeuronTopK", b"5")}
    assert all(proto.describe(c.shape).endswith("uint32[3,5])") for c in calls)
    assert "topk" not in opcodes(program)


def write(cache_bskh, new_btkh, at_b):
    return cache_bskh.at[jnp.arange(2), at_b].set(new_btkh[:, 0], mode="promise_in_bounds")


@pytest.mark.parametrize("tp", DEGREES)
def test_a_donated_cache_is_written_in_place(tp: int) -> None:
    cache, new, at = normal(2, 16, 8, 4), normal(2, 1, 8, 4), np.array([3, 15], np.int32)
    spec = P(None, None, "tp")
    program = lower(
        write, cache, new, at, tp_degree=tp, in_specs=(spec, spec, None), out_specs=spec, donate_argnums=(0,)
    )
    expected = cache.copy()
    expected[np.arange(2), at] = new[:, 0]
    np.testing.assert_array_equal(program.run(cache, new, at)[0], expected)
    (output,) = program.outputs
    assert (output.kind, output.name, output.alias) == ("state", "cache_bskh", 0)
    entries = proto.parse(program.hlo_module).input_output_alias.entries
    assert [(e.parameter_number, e.kind) for e in entries] == [(0, proto.MUST_ALIAS)]
    assert "copy" not in opcodes(program)
    assert program.cost().bytes_written == 2 * 8 * 4 * 4 // tp


@pytest.mark.parametrize("tp", [1, 2])
def test_a_donated_input_without_an_output_is_refused(tp: int) -> None:
    with pytest.raises(LoweringError, match="no outputs take the memory of cache"):
        lower(lambda cache, x: x + cache.sum(), Shape((4, 8), jnp.float32), Shape((4,), jnp.float32),
              tp_degree=tp, in_specs=(P(None, "tp"), None), donate_argnums=(0,))  # fmt: skip


@pytest.mark.parametrize("tp", DEGREES)
def test_reductions_of_a_parallel_residual_are_merged(tp: int) -> None:
    arrays = [normal(4, 32), normal(32, 64), normal(64, 32), normal(32, 64), normal(64, 32)]
    column, row = P(None, "tp"), P("tp")

    def block(x, a, b, c, d):
        return x + jnp.tanh(x @ a) @ b + (jax.nn.relu(x @ c) @ d + 1.0)

    program = lower(block, *arrays, tp_degree=tp, in_specs=(None, column, row, column, row))
    x, a, b, c, d = arrays
    expected = x + np.tanh(x @ a) @ b + np.maximum(x @ c, 0) @ d + 1
    np.testing.assert_allclose(program.run(*arrays)[0], expected, atol=1e-3)
    assert len(program.collectives()) == (tp > 1)


def test_reductions_used_elsewhere_are_not_merged() -> None:
    arrays = [normal(4, 32), normal(32, 64), normal(64, 32), normal(64, 32)]

    def block(x, a, b, c):
        h = jnp.tanh(x @ a)
        first = h @ b
        return first + h @ c, first

    column, row = P(None, "tp"), P("tp")
    program = lower(block, *arrays, tp_degree=4, in_specs=(None, column, row, row))
    x, a, b, c = arrays
    np.testing.assert_allclose(program.run(*arrays)[1], np.tanh(x @ a) @ b, atol=1e-4)
    np.testing.assert_allclose(program.run(*arrays)[0], np.tanh(x @ a) @ b + np.tanh(x @ a) @ c, atol=1e-4)
    assert len(program.collectives()) == 2


@pytest.mark.parametrize("tp", [1, 4])
def test_shard_map_and_constraints_know_the_mesh(tp: int) -> None:
    x, up, down = normal(4, 32), normal(32, 64), normal(64, 32)

    def fn(x, up, down):
        h = jax.lax.with_sharding_constraint(x @ up, P(None, "tp"))
        local = jax.shard_map(lambda a, b: jax.lax.psum(a @ b, "tp"), in_specs=(P(None, "tp"), P("tp")), out_specs=P())
        return local(h, down)

    program = lower(fn, x, up, down, tp_degree=tp, in_specs=(None, P(None, "tp"), P("tp")))
    np.testing.assert_allclose(program.run(x, up, down)[0], x @ up @ down, atol=1e-3)
    assert not {"call", "copy"} & set(opcodes(program))
    assert len(program.collectives()) == (tp > 1)


def test_outputs_split_over_the_cores_come_back_whole() -> None:
    x_bd, w_dv = normal(3, 16), normal(16, 32)
    program = lower(jnp.matmul, x_bd, w_dv, tp_degree=4, in_specs=(None, P(None, "tp")), out_specs=P(None, "tp"))
    np.testing.assert_allclose(program.run(x_bd, w_dv)[0], x_bd @ w_dv, atol=1e-4)
    assert (program.outputs[0].shape, program.outputs[0].global_shape(4)) == ((3, 8), (3, 32))
    assert program.collectives() == []


def test_collectives_say_who_takes_part_and_how_many_bytes() -> None:
    shapes = [Shape((4, 64), jnp.bfloat16), Shape((64, 256), jnp.bfloat16), Shape((256, 64), jnp.bfloat16)]
    program = lower(mlp, *shapes, tp_degree=4, in_specs=(None, P(None, "tp"), P("tp")))
    (found,) = program.collectives()
    assert (found.opcode, found.shape, found.bytes) == ("all-reduce", "bfloat16[4,64]", 4 * 64 * 2)
    assert found.replica_groups == ((0, 1, 2, 3),)


@pytest.mark.parametrize("tp", [64, 3])
def test_degrees_beyond_the_devices_of_jax(tp: int) -> None:
    x, up, down = normal(2, 24), normal(24, 192), normal(192, 24)
    program = lower(mlp, x, up, down, tp_degree=tp, in_specs=(None, P(None, "tp"), P("tp")))
    np.testing.assert_allclose(program.run(x, up, down)[0], np.maximum(x @ up, 0) @ down, atol=1e-3)
    assert program.collectives()[0].replica_groups == (tuple(range(tp)),)


def test_names_and_kinds_follow_the_arguments() -> None:
    def step(params, cache, tokens, *sampling):
        return tokens + sampling[0], jax.tree.map(lambda c: c + params["a.w"], cache)

    scalar = Shape((), jnp.float32)
    program = lower(
        step, {"b.w": scalar, "a.w": scalar}, [(scalar, scalar)], scalar, scalar, scalar,
        donate_argnums=(1,), input_kinds=("param", "state", "input", "input", "input"), name="decode",
    )  # fmt: skip
    assert [(s.name, s.kind) for s in program.inputs] == [
        ("a.w", "param"), ("b.w", "param"), ("cache.0.0", "state"), ("cache.0.1", "state"),
        ("tokens", "input"), ("sampling0", "input"), ("sampling1", "input"),
    ]  # fmt: skip
    assert [(s.name, s.kind, s.alias) for s in program.outputs] == [
        ("output.0", "output", None), ("cache.0.0", "state", 2), ("cache.0.1", "state", 3),
    ]  # fmt: skip
    assert program.name == "decode"
    assert program.as_text().startswith("HloModule decode")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_degree": 0}, "tp_degree=0"),
        ({"tp_degree": 3, "in_specs": (P("tp"), None)}, r"x of shape \(4, 6\) cannot be split"),
        ({"in_specs": (P("model"), None)}, "name the axis 'tp'"),
        ({"in_specs": (P("tp", "tp"), None)}, "at most once"),
        ({"in_specs": (P(None, None, "tp"), None)}, "at most 2 axes"),
        ({"in_specs": (None,)}, "in_specs is no prefix"),
        ({"out_specs": (None, None)}, "out_specs is no prefix"),
        ({"input_kinds": ["param"]}, "1 input_kinds given for 2 arguments"),
        ({"input_names": ["x"]}, "1 input_names given for 2 arrays"),
    ],
)
def test_what_cannot_be_lowered_is_refused(options: dict, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        lower(lambda x, y: x @ y, Shape((4, 6), jnp.float32), Shape((6, 2), jnp.float32), **options)


def test_run_refuses_what_does_not_fit() -> None:
    program = lower(lambda x, y: x @ y, Shape((4, 6), jnp.float32), Shape((6, 2), jnp.float32))
    with pytest.raises(InputError, match=r"y is float32\[2, 6\], and must be float32\[6, 2\]"):
        program.run(normal(4, 6), normal(2, 6))
    with pytest.raises(InputError, match="takes 2 arrays"):
        program.run(normal(4, 6))


HIDDEN, WEIGHT = Shape((32, 4, 2), jnp.float32), Shape((32, 64), jnp.float32)


def lm_head(hidden_dtb=HIDDEN, weight_dv=WEIGHT):
    return jnp.einsum("dtb,dv->vtb", hidden_dtb, weight_dv)


def test_compile_py_func_of_a_language_model_head() -> None:
    hidden, weight = normal(32, 4, 2), normal(32, 64)
    split = {"tp_degree": 4, "in_specs": (None, P(None, "tp")), "out_specs": P("tp")}
    program = lower(lm_head, hidden, weight, **split)
    assert compile_py_func(lm_head, **split) == program.hlo_module
    np.testing.assert_allclose(program.run(hidden, weight)[0], np.einsum("dtb,dv->vtb", hidden, weight), atol=1e-4)
    with pytest.raises(LoweringError, match="needs the shapes of mlp"):
        compile_py_func(mlp)


def test_several_programs_at_once_are_those_of_one_by_one() -> None:
    w = Shape((16, 32), jnp.float32)
    traced = [
        trace(jnp.matmul, Shape((n, 16), jnp.float32), w, tp_degree=2, in_specs=(None, P(None, "tp")), name=f"b{n}")
        for n in (1, 2, 3)
    ]
    programs = list(lower_many(traced))
    assert [p.name for p in programs] == ["b1", "b2", "b3"]
    assert programs == [t.lower() for t in traced]


def spectrum(x):
    return jnp.fft.fft(x)


def test_verify_names_the_line_of_source() -> None:
    program = lower(spectrum, Shape((8,), jnp.complex64))
    found = program.verify("trn1")
    assert found
    assert f"{__file__}:{spectrum.__code__.co_firstlineno + 1}" in {v.source for v in found}


IN_A_STARTED_PROCESS = """
import hashlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
assert jnp.zeros(3).sum() == 0 and len(jax.devices()) == 1
from jx_neuron.lowering import lower
r = np.random.default_rng(0)
x, up, down = (r.standard_normal(s).astype("float32") for s in ((4, 64), (64, 256), (256, 64)))
wte = r.standard_normal((64, 64)).astype("float32")
def fn(x, up, down, wte):
    y = x + jax.nn.gelu(x @ up) @ down
    return jnp.argmax(y @ wte.T, -1), jax.lax.top_k(y, 3)
program = lower(fn, x, up, down, wte, tp_degree=8, in_specs=(None, P(None, "tp"), P("tp"), P("tp")))
found = program.run(x, up, down, wte)
assert all(np.array_equal(a, b) for a, b in zip(found[:1], jax.tree.leaves(fn(x, up, down, wte))[:1], strict=True))
assert len(jax.devices()) == 1
print(hashlib.sha256(program.hlo_module).hexdigest())
"""


def test_a_process_started_with_one_device_and_the_same_bytes_from_two(tmp_path: Path) -> None:
    digests = []
    for folder, seed in (("here", "1"), ("a/longer/path/elsewhere", "2")):
        script = tmp_path / folder / f"script{seed}.py"
        script.parent.mkdir(parents=True)
        script.write_text("\n" * int(seed) + IN_A_STARTED_PROCESS)
        path = str(Path(__file__).parent.parent)
        done = subprocess.run(
            [sys.executable, str(script)],
            env={"PYTHONPATH": path, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.strip())
    assert digests[0] == digests[1]
