"""The HloModuleProto that lowering writes, and the forms of replica groups that it reads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jx_neuron.errors import LoweringError
from jx_neuron.lowering import lower
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.legalize.passes import legalize
from jx_neuron.lowering.partition import partition


def test_ids_are_small_names_are_plain_and_nothing_tells_of_this_machine() -> None:
    f32 = jnp.float32

    def fn(x, wte):
        y = x @ wte.T
        return jax.nn.softmax(y), jnp.argmax(y, -1), jax.nn.softmax(y * 2)

    program = lower(
        fn, jax.ShapeDtypeStruct((4, 8), f32), jax.ShapeDtypeStruct((64, 8), f32), tp_degree=4, in_specs=(None, P("tp"))
    )
    module = proto.parse(program.hlo_module)
    ids = [i.id for i in proto.instructions(module)]
    assert ids == list(range(1, len(ids) + 1))
    assert [c.id for c in module.computations] == list(range(1, len(module.computations) + 1))
    assert module.computations[-1].name == "main"
    assert all(i.name == f"{i.opcode}.{i.id}" for i in proto.instructions(module))
    regions = [c.SerializeToString() for c in module.computations]
    assert len(set(regions)) == len(regions)
    for i in proto.instructions(module):
        assert not i.channel_id
        assert not i.use_global_device_ids
        assert not i.HasField("metadata")
        assert not i.sharding
        if i.opcode in proto.COLLECTIVES:
            assert [list(g.replica_ids) for g in i.replica_groups] == [[0, 1, 2, 3]]
            assert [list(g.replica_ids) for g in i.collective_device_list.replica_groups] == [[0, 1, 2, 3]]
    assert b"test_lowering" not in program.hlo_module
    assert b"jit(" not in program.hlo_module
    assert program.sources
    assert all(line.startswith(__file__) for line in program.sources.values())
    assert set(program.sources) <= {i.name for i in proto.instructions(module)}


def test_legalizing_twice_changes_nothing() -> None:
    shapes = [jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((64, 8), jnp.float32)]
    program = lower(lambda x, w: jnp.argmax(x @ w.T, -1), *shapes, tp_degree=4, in_specs=(None, P("tp")))
    assert legalize(program.hlo_module, 4, program.name, {}).hlo_module == program.hlo_module


def test_what_is_not_described_survives() -> None:
    unknown = b"\xba\x3e\x05hello"  # field 999, bytes
    module = proto.Module.FromString(proto.Module(name="m").SerializeToString() + unknown)
    assert proto.serialize(module).endswith(unknown)


def collective(**fields: object) -> object:
    return proto.Instruction(opcode="all-reduce", **fields)


def test_replica_groups_in_each_of_their_forms() -> None:
    plain = [{"replica_ids": [0, 2]}, {"replica_ids": [1, 3]}]
    iota = {
        "num_replica_groups": 2,
        "num_devices_per_group": 2,
        "iota_reshape_dims": [2, 2],
        "iota_transpose_perm": [1, 0],
    }
    mesh = {"axes": [{"name": "a", "size": 2}, {"name": "b", "size": 2}]}
    for instruction in (
        collective(replica_groups=plain),
        collective(collective_device_list={"replica_groups": plain}),
        collective(collective_device_list={"iota_replica_group_list": iota}),
        collective(iota_groups=iota),
        collective(mesh_groups={"mesh": mesh, "axes": [{"mesh_axis_index": 0}]}),
    ):
        assert proto.replica_groups(instruction, 4) == [[0, 2], [1, 3]]
    assert proto.replica_groups(collective(), 4) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("part", "groups"),
    [
        ({"pre_size": 1, "size": 2}, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ({"pre_size": 2, "size": 2}, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ({"pre_size": 4, "size": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"pre_size": 2, "size": 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_replica_groups_of_a_part_of_an_axis(part: dict, groups: list) -> None:
    mesh = {"axes": [{"name": "tp", "size": 8}]}
    axes = [{"mesh_axis_index": 0, "sub_axis_info": part}]
    assert proto.replica_groups(collective(mesh_groups={"mesh": mesh, "axes": axes}), 8) == groups


def test_sizes_of_shapes() -> None:
    pair = proto.tuple_shape([proto.shape("bfloat16", (3, 5)), proto.shape("bool", (7,))])
    assert proto.nbytes(pair) == 3 * 5 * 2 + 7
    assert proto.nbytes(proto.shape("int4", (3,))) == 2
    assert proto.nbytes(proto.shape("float8_e4m3fn", (3,))) == 3
    assert proto.describe(pair) == "(bfloat16[3,5], bool[7])"


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint32", "int64", "float32", "float16", "bfloat16", "uint8"])
def test_scalar_literals(dtype: str) -> None:
    literal = proto.scalar_literal(dtype, 1)
    stored = [v for f, v in literal.ListFields() if f.name != "shape"]
    assert len(stored) == 1
    (value,) = stored if isinstance(stored[0], bytes) else ([*stored[0]],)
    found = np.frombuffer(value, np.dtype(dtype)) if isinstance(value, bytes) else np.array(value)
    assert found.tolist() == [1]


def test_jaxlib_internals_are_used_in_one_place() -> None:
    package = Path(__file__).parent.parent / "jx_neuron"
    users = {
        path.name
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("import jaxlib", "from jaxlib", "from jax._src", "import jax._src"))
    }
    assert users == {"_jaxlib.py"}


def test_what_xla_cannot_partition_is_an_error_not_an_abort() -> None:
    with pytest.raises(LoweringError, match="XLA could not partition the program over 2 cores"):
        partition(b"no StableHLO", 2)
