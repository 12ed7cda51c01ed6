"""An executable that keeps its arrays on the devices, step after step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import InputError, LoweringError
from jx_neuron.lowering import Executable, lower
from jx_neuron.lowering.hlo import proto

TP = 4
RNG = np.random.default_rng(1)


def step(weight_de, cache_se, x_d, at):
    """Writes x · weight into the cache, and sums what is there."""
    cache_se = jax.lax.dynamic_update_index_in_dim(cache_se, x_d @ weight_de, at, 0)
    return cache_se.sum(0), cache_se


@pytest.fixture(scope="module")
def program():
    f32 = jnp.float32
    return lower(
        step,
        jax.ShapeDtypeStruct((8, 16), f32), jax.ShapeDtypeStruct((6, 16), f32),
        jax.ShapeDtypeStruct((8,), f32), jax.ShapeDtypeStruct((), jnp.int32),
        tp_degree=TP, in_specs=(P(None, "tp"), P(None, "tp"), None, None),
        out_specs=(P("tp"), P(None, "tp")), donate_argnums=(1,), input_kinds=("param", "state", "input", "input"),
    )  # fmt: skip


def test_a_cache_stays_on_the_devices_from_step_to_step(program) -> None:
    executable = Executable(program.hlo_module, TP)
    weight_de = RNG.standard_normal((8, 16)).astype(np.float32)
    weight = jax.device_put(weight_de, executable.sharding((None, "tp")))
    cache: list | jax.Array = executable.put([np.zeros((6, 4), np.float32)] * TP)
    expected = np.zeros((6, 16), np.float32)
    for at in range(6):
        x_d = RNG.standard_normal(8).astype(np.float32)
        before = cache
        sums, cache = executable.execute([weight, cache, [x_d] * TP, [np.int32(at)] * TP])
        expected[at] = x_d @ weight_de
        np.testing.assert_allclose(np.concatenate([np.asarray(s) for s in sums]), expected.sum(0), atol=1e-5)
        consumed = before if isinstance(before, list) else [before]
        assert all(array.is_deleted() for array in consumed)
    np.testing.assert_allclose(np.concatenate([np.asarray(c) for c in cache], axis=1), expected, atol=1e-5)
    assert not weight.is_deleted()
    assert [c.device for c in cache] == executable.mesh.devices.tolist()


def test_each_core_gets_its_own(program) -> None:
    executable = Executable(program.hlo_module, TP)
    weights = [np.full((8, 4), rank, np.float32) for rank in range(TP)]
    caches = [np.zeros((6, 4), np.float32)] * TP
    sums, _ = executable.execute([weights, caches, [np.ones(8, np.float32)] * TP, [np.int32(2)] * TP])
    for rank, found in enumerate(sums):
        np.testing.assert_array_equal(np.asarray(found), np.full(4, 8.0 * rank))


def test_what_does_not_fit_is_refused_before_it_runs(program) -> None:
    executable = Executable(program.hlo_module, TP)
    cache = executable.put([np.zeros((6, 4), np.float32)] * TP)
    x, at = [np.ones(8, np.float32)] * TP, [np.int32(0)] * TP
    with pytest.raises(
        InputError, match=r"argument 0 is float32\[4, 8\] on each core: the program takes float32\[8, 4\]"
    ):
        executable.execute([[np.zeros((4, 8), np.float32)] * TP, cache, x, at])
    with pytest.raises(InputError, match="argument 0 is int32"):
        executable.execute([[np.zeros((8, 4), np.int32)] * TP, cache, x, at])
    with pytest.raises(InputError, match="3 arguments given: the program takes 4"):
        executable.execute([cache, x, at])
    with pytest.raises(InputError, match="2 arrays given for 4 cores"):
        executable.execute([[np.zeros((8, 4), np.float32)] * 2, cache, x, at])
    assert not cache.is_deleted()


def test_custom_calls_of_neuron_alone_are_refused() -> None:
    module = proto.parse(lower(lambda x: jax.lax.top_k(x, 2), jax.ShapeDtypeStruct((8,), jnp.float32)).hlo_module)
    for i in proto.instructions(module):
        if i.opcode == "custom-call":
            i.custom_call_target = "AwsNeuronRmsNorm"
    with pytest.raises(LoweringError, match="AwsNeuronRmsNorm runs on Neuron only"):
        Executable(proto.serialize(module), 1)


@pytest.mark.parametrize("data", [b"", b"\x00\x01garbage", b"\x0a\x04name"])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(LoweringError, match="not a serialized HloModuleProto"):
        Executable(data, 1)
