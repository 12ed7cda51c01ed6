"""HloModuleProto: the part of XLA's `hlo.proto` and `xla_data.proto` that lowering reads or writes.

Messages are built from the table below, so no generated code is needed, and fields that the table does not name survive
a parse and a serialize unchanged. Field numbers: https://github.com/openxla/xla/blob/main/xla/service/hlo.proto and
https://github.com/openxla/xla/blob/main/xla/xla_data.proto.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Final

import ml_dtypes  # noqa: F401  (its types become known to numpy by name)
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from jx_neuron.errors import LoweringError

# message: field=number type; a leading * repeats; a capital names another message; opaque messages are bytes.
_SCHEMA: Final = {
    "Layout": "minor_to_major=1 *int64",
    "Shape": "element_type=2 int32, dimensions=3 *int64, tuple_shapes=4 *Shape, layout=5 Layout, "
    "is_dynamic_dimension=6 *bool",
    "ProgramShape": "parameters=1 *Shape, result=2 Shape, parameter_names=3 *string",
    "Literal": "shape=1 Shape, preds=2 *bool, u8s=3 bytes, s32s=4 *int32, s64s=5 *int64, u32s=6 *uint32, "
    "u64s=7 *uint64, f32s=8 *float, f64s=9 *double, tuple_literals=10 *Literal, f16s=11 bytes, bf16s=13 bytes, "
    "s8s=15 bytes, u16s=16 bytes, s16s=17 bytes",
    "Metadata": "op_type=1 string, op_name=2 string, source_file=3 string, source_line=4 int32, "
    "stack_frame_id=15 int32",
    "WindowDimension": "size=1 int64, stride=2 int64, padding_low=3 int64, padding_high=4 int64, "
    "window_dilation=5 int64, base_dilation=6 int64, window_reversal=7 bool",
    "Window": "dimensions=1 *WindowDimension",
    "ConvolutionDimensions": "kernel_input_feature_dimension=3 int64, kernel_output_feature_dimension=4 int64, "
    "kernel_spatial_dimensions=6 *int64, input_batch_dimension=7 int64, input_feature_dimension=8 int64, "
    "output_batch_dimension=9 int64, output_feature_dimension=10 int64, input_spatial_dimensions=11 *int64, "
    "output_spatial_dimensions=12 *int64",
    "DotDimensions": "lhs_contracting_dimensions=1 *int64, rhs_contracting_dimensions=2 *int64, "
    "lhs_batch_dimensions=3 *int64, rhs_batch_dimensions=4 *int64",
    "GatherDimensions": "offset_dims=1 *int64, collapsed_slice_dims=2 *int64, start_index_map=3 *int64, "
    "index_vector_dim=4 int64, operand_batching_dims=5 *int64, start_indices_batching_dims=6 *int64",
    "ScatterDimensions": "update_window_dims=1 *int64, inserted_window_dims=2 *int64, "
    "scatter_dims_to_operand_dims=3 *int64, index_vector_dim=4 int64, input_batching_dims=5 *int64, "
    "scatter_indices_batching_dims=6 *int64",
    "SliceDimension": "start=1 int64, limit=2 int64, stride=3 int64",
    "SourceTarget": "source=1 int64, target=2 int64",
    "ReplicaGroup": "replica_ids=1 *int64",
    "IotaGroups": "num_replica_groups=1 int64, num_devices_per_group=2 int64, iota_reshape_dims=3 *int64, "
    "iota_transpose_perm=4 *int32",
    "DeviceList": "replica_groups=1 *ReplicaGroup, iota_replica_group_list=2 IotaGroups",
    "MeshAxis": "name=1 string, size=2 int64",
    "Mesh": "axes=1 *MeshAxis, device_ids=2 *int64",
    "SubAxis": "pre_size=1 int64, size=2 int64",
    "AxisRef": "mesh_axis_index=1 int64, sub_axis_info=2 SubAxis",
    "MeshGroups": "mesh=1 Mesh, axes=2 *AxisRef",
    "Instruction": "name=1 string, opcode=2 string, shape=3 Shape, metadata=7 Metadata, literal=8 Literal, "
    "parameter_number=9 int64, fusion_kind=11 string, tuple_index=13 int64, dimensions=14 *int64, window=15 Window, "
    "convolution_dimension_numbers=16 ConvolutionDimensions, slice_dimensions=17 *SliceDimension, "
    "exponent_bits=18 int32, mantissa_bits=19 int32, dynamic_slice_sizes=20 *int64, padding_config=21 bytes, "
    "distribution=23 int32, channel_id=26 int64, custom_call_target=28 string, "
    "dot_dimension_numbers=30 DotDimensions, fft_type=31 int32, gather_dimension_numbers=33 GatherDimensions, "
    "gather_slice_sizes=34 *int64, id=35 int64, operand_ids=36 *int64, control_predecessor_ids=37 *int64, "
    "called_computation_ids=38 *int64, sharding=40 bytes, backend_config=43 bytes, all_reduce_id=45 int64, "
    "scatter_dimension_numbers=48 ScatterDimensions, replica_groups=49 *ReplicaGroup, feature_group_count=50 int64, "
    "precision_config=51 bytes, source_target_pairs=52 *SourceTarget, batch_group_count=58 int64, is_stable=60 bool, "
    "parameter_replication=61 bytes, comparison_direction=63 string, custom_call_has_side_effect=65 bool, "
    "indices_are_sorted=67 bool, frontend_attributes=68 bytes, unique_indices=69 bool, rng_algorithm=70 int32, "
    "use_global_device_ids=71 bool, comparison_type=72 string, custom_call_api_version=77 int32, k=81 int64, "
    "statistics_viz=82 bytes, largest=85 bool, collective_device_list=87 DeviceList, original_value=88 bytes, "
    "iota_groups=92 IotaGroups, mesh_groups=93 MeshGroups",
    "Computation": "name=1 string, instructions=2 *Instruction, program_shape=4 ProgramShape, id=5 int64, "
    "root_id=6 int64",
    "AliasEntry": "output_shape_index=1 *int64, parameter_number=2 int64, parameter_shape_index=3 *int64, kind=4 int32",
    "Alias": "entries=1 *AliasEntry",
    "DonorEntry": "parameter_number=1 int64, parameter_shape_index=2 *int64",
    "Donor": "entries=1 *DonorEntry",
    "FileLocation": "file_name_id=1 int32, function_name_id=2 int32, line=3 int32, column=4 int32",
    "StackFrame": "file_location_id=1 int32, parent_frame_id=2 int32",
    "StackFrames": "file_names=1 *string, function_names=2 *string, file_locations=3 *FileLocation, "
    "stack_frames=4 *StackFrame",
    "Module": "name=1 string, entry_computation_name=2 string, computations=3 *Computation, "
    "host_program_shape=4 ProgramShape, id=5 int64, entry_computation_id=6 int64, schedule=7 bytes, "
    "input_output_alias=8 Alias, cross_program_prefetches=10 *bytes, is_dynamic=11 bool, "
    "spmd_output_sharding=12 bytes, profile_info=13 *bytes, spmd_parameters_shardings=14 *bytes, "
    "device_assignment=15 bytes, use_auto_spmd_partitioning=16 bool, stack_frame_index=17 StackFrames, "
    "buffer_donor=18 Donor, frontend_attributes=19 bytes, original_value_recovery_table=20 bytes",
    "HloProto": "hlo_module=1 Module",
}

# xla.PrimitiveType to the names that numpy and ml_dtypes know.
DTYPES: Final = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 15: "complex64", 16: "bfloat16", 18: "complex128", 19: "float8_e5m2",
    20: "float8_e4m3fn", 21: "int4", 22: "uint4", 23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz",
    25: "float8_e4m3fnuz", 26: "int2", 27: "uint2", 28: "float8_e4m3", 29: "float8_e3m4", 32: "float4_e2m1fn",
    33: "float8_e8m0fnu",
}  # fmt: skip
PRIMITIVE_TYPES: Final = {name: number for number, name in DTYPES.items()}
TUPLE: Final = 13
MUST_ALIAS: Final = 2
COLLECTIVES: Final = frozenset(
    {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"}
)
_BITS: Final = {"bool": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4, "bfloat16": 16}


def _messages() -> dict[str, Any]:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="jx_neuron/hlo.proto", package="jx_neuron.hlo", syntax="proto3")
    for message_name, fields in _SCHEMA.items():
        message = file.message_type.add(name=message_name)
        for row in fields.split(", "):
            head, kind = row.split(" ")
            name, number = head.split("=")
            field = message.field.add(name=name, number=int(number))
            field.label = field_type.LABEL_REPEATED if kind[0] == "*" else field_type.LABEL_OPTIONAL
            kind = kind.lstrip("*")
            if kind in _SCHEMA:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".jx_neuron.hlo.{kind}"
            else:
                field.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    # all of them now: two threads that are the first to need one may get a class each
    names = {name: f"jx_neuron.hlo.{name}" for name in _SCHEMA}
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(path)) for name, path in names.items()}


_classes = _messages()
Module = _classes["Module"]
Computation = _classes["Computation"]
Instruction = _classes["Instruction"]
Literal = _classes["Literal"]
Shape = _classes["Shape"]
HloProto = _classes["HloProto"]


def parse(data: bytes) -> Any:
    """Parses a serialized HloModuleProto. Raises LoweringError where the bytes hold none."""
    try:
        module = Module.FromString(data)
    except DecodeError as error:
        raise LoweringError(f"not a serialized HloModuleProto: {error}") from error
    if not any(c.id == module.entry_computation_id for c in module.computations):
        raise LoweringError("not a serialized HloModuleProto: it has no entry computation")
    return module


def serialize(module: Any) -> bytes:
    """The same message gives the same bytes."""
    data: bytes = module.SerializeToString(deterministic=True)
    return data


def entry(module: Any) -> Any:
    """The computation that the module starts with."""
    return next(c for c in module.computations if c.id == module.entry_computation_id)


def root(computation: Any) -> Any:
    """The instruction whose value the computation returns."""
    return next(i for i in computation.instructions if i.id == computation.root_id)


def parameters(computation: Any) -> list[Any]:
    """Its parameter instructions, by number."""
    parameters = (i for i in computation.instructions if i.opcode == "parameter")
    return sorted(parameters, key=lambda i: i.parameter_number)


def instructions(module: Any) -> Iterator[Any]:
    """Every instruction of every computation."""
    for computation in module.computations:
        yield from computation.instructions


def shape(dtype: str, dimensions: tuple[int, ...]) -> Any:
    """An array shape in row-major layout."""
    static = [False] * len(dimensions)
    result = Shape(element_type=PRIMITIVE_TYPES[dtype], dimensions=dimensions, is_dynamic_dimension=static)
    result.layout.minor_to_major.extend(reversed(range(len(dimensions))))
    return result


def tuple_shape(elements: list[Any]) -> Any:
    """The shape of a tuple of these shapes."""
    return Shape(element_type=TUPLE, tuple_shapes=elements)


_LITERAL_FIELDS: Final = {
    "bool": "preds", "int32": "s32s", "int64": "s64s", "uint32": "u32s", "uint64": "u64s", "float32": "f32s",
    "float64": "f64s", "int8": "s8s", "int16": "s16s", "uint8": "u8s", "uint16": "u16s", "float16": "f16s",
    "bfloat16": "bf16s",
}  # fmt: skip


def scalar_literal(dtype: str, value: float) -> Any:
    """A literal of no dimensions. KeyError for types that no rewrite makes constants of."""
    literal, field = Literal(shape=shape(dtype, ())), _LITERAL_FIELDS[dtype]
    if isinstance(getattr(literal, field), bytes):
        setattr(literal, field, np.array(value, np.dtype(dtype)).tobytes())
    else:
        getattr(literal, field).append(value)
    return literal


def leaves(shape: Any) -> list[Any]:
    """The array shapes in a possibly nested tuple shape."""
    if shape.element_type != TUPLE:
        return [shape]
    return [leaf for element in shape.tuple_shapes for leaf in leaves(element)]


def dtype(shape: Any) -> str:
    """The name of an array shape's element type; "tuple" or "token" for what is no array."""
    return DTYPES.get(
        shape.element_type, {TUPLE: "tuple", 14: "opaque", 17: "token"}.get(shape.element_type, "unknown")
    )


def nbytes(shape: Any) -> int:
    """Bytes of a shape, tuples summed."""
    total = 0
    for leaf in leaves(shape):
        if leaf.element_type in DTYPES:
            name = DTYPES[leaf.element_type]
            bits = _BITS.get(name) or (8 if name.startswith("float8") else np.dtype(name).itemsize * 8)
            total += (math.prod(leaf.dimensions) * bits + 7) // 8
    return total


def describe(shape: Any) -> str:
    """A shape as text: float32[4,64]."""
    if shape.element_type == TUPLE:
        return f"({', '.join(map(describe, shape.tuple_shapes))})"
    return f"{dtype(shape)}[{','.join(map(str, shape.dimensions))}]"


def replica_groups(instruction: Any, count: int) -> list[list[int]]:
    """The replica groups of a collective over `count` participants, from any of the proto's four forms."""
    listed = instruction.collective_device_list
    if instruction.HasField("mesh_groups"):
        return _mesh_groups(instruction.mesh_groups)
    for iota in (instruction.iota_groups, listed.iota_replica_group_list):
        if iota.num_replica_groups:
            ids = np.arange(math.prod(iota.iota_reshape_dims)).reshape(iota.iota_reshape_dims)
            ids = ids.transpose(iota.iota_transpose_perm or None)
            grouped: list[list[int]] = ids.reshape(iota.num_replica_groups, iota.num_devices_per_group).tolist()
            return grouped
    explicit = listed.replica_groups or instruction.replica_groups
    return [list(group.replica_ids) for group in explicit] or [list(range(count))]


def _mesh_groups(groups: Any) -> list[list[int]]:
    """Cores that agree on every axis of the mesh, or part of one, that is not named. A part is pre × size × rest."""
    sizes: list[int] = []
    named: list[bool] = []
    for index, axis in enumerate(groups.mesh.axes):
        spans = [_span(ref, axis.size) for ref in groups.axes if ref.mesh_axis_index == index]
        cuts = sorted({1, axis.size, *itertools.chain(*spans)})
        for low, high in itertools.pairwise(cuts):
            sizes.append(high // low)
            named.append(any(start <= low and high <= stop for start, stop in spans))
    ids = np.array(groups.mesh.device_ids or range(math.prod(sizes))).reshape(sizes)
    order = sorted(range(len(sizes)), key=lambda axis: named[axis])
    members = math.prod(size for size, is_named in zip(sizes, named, strict=True) if is_named)
    result: list[list[int]] = ids.transpose(order).reshape(-1, members).tolist()
    return result


def _span(ref: Any, size: int) -> tuple[int, int]:
    if not ref.HasField("sub_axis_info"):
        return 1, size
    return ref.sub_axis_info.pre_size, ref.sub_axis_info.pre_size * ref.sub_axis_info.size
