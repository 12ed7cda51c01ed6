"""One core's HLO as XLA's partitioner leaves it → HLO as neuronx-cc takes it, and as XLA of 2023 reads it.

Replica groups and custom calls have the form in which transformers-neuronx and nkipy emit them. The same input gives
the same bytes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jx_neuron.errors import LoweringError
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.hlo.rewrite import Rewriter, inline_calls
from jx_neuron.lowering.legalize.reassociate import merge_all_reduces
from jx_neuron.lowering.legalize.reduction import split_argreduce
from jx_neuron.lowering.legalize.scaling import scale_before_all_reduces

TOP_K = "AwsNeuronTopK"


@dataclass(frozen=True)
class Legalized:
    """hlo_module: a serialized HloModuleProto. takes_rank: its last parameter is the rank, int32[1].

    sources: instruction name → file:line, where known.
    """

    hlo_module: bytes
    takes_rank: bool
    sources: dict[str, str]


def legalize(
    hlo_module: bytes, tp_degree: int, name: str, aliases: Mapping[int, int], whole: Collection[int] = ()
) -> Legalized:
    """A per-core program in the form that neuronx-cc takes.

    Args:
        hlo_module: a serialized HloModuleProto, partitioned over `tp_degree` cores.
        name: what the module is called in the result.
        aliases: output → the parameter whose memory it takes.
        whole: the parameters that are the same on every core.

    Raises:
        LoweringError: the bytes are no HLO module, or it takes the top k of the smallest values.
    """
    module = proto.parse(hlo_module)
    inline_calls(module)
    takes_rank = _rank_parameter(module)
    for computation in list(module.computations):
        Rewriter(module, computation).run(lambda rewriter, i: _instruction(rewriter, i, tp_degree))
        if computation.id == module.entry_computation_id:
            scale_before_all_reduces(module, computation, frozenset(whole))
        merge_all_reduces(module, computation)
    _alias(module, aliases)
    sources = _canonical(module, name)
    return Legalized(proto.serialize(module), takes_rank, sources)


def _instruction(rewriter: Rewriter, i: Any, tp_degree: int) -> None:
    if i.opcode in proto.COLLECTIVES:
        _collective(rewriter, i, tp_degree)
    elif i.opcode == "copy" or _is_annotation(i):
        rewriter.replace(i, rewriter.operands(i)[0])
    elif i.opcode == "get-tuple-element" and rewriter.operands(i)[0].opcode == "tuple":
        rewriter.replace(i, rewriter.operands(rewriter.operands(i)[0])[i.tuple_index])
    elif i.opcode == "partition-id":
        _rank(rewriter, i)
    elif i.opcode == "topk":
        _top_k(rewriter, i)
    elif i.opcode == "reduce" and len(i.operand_ids) == 4:
        split_argreduce(rewriter, i)


def _is_annotation(i: Any) -> bool:
    """Whether this is a sharding annotation. Programs of one core keep them, since no partitioner removed them."""
    target = i.custom_call_target
    return len(i.operand_ids) == 1 and (target == "Sharding" or target.startswith(("SPMD", "xla.sdy.")))


def _collective(rewriter: Rewriter, i: Any, tp_degree: int) -> None:
    """Rewrites a collective to dense replica groups without channel ids; groups of one core need no collective."""
    if i.opcode == "collective-permute":
        is_single_core = tp_degree == 1
    else:
        groups = proto.replica_groups(i, tp_degree)
        for field in ("iota_groups", "mesh_groups", "collective_device_list", "replica_groups"):
            i.ClearField(field)
        for members in groups:
            i.replica_groups.add(replica_ids=members)  # the form before 2024
            i.collective_device_list.replica_groups.add(replica_ids=members)
        is_single_core = len(groups[0]) == 1
    for field in ("channel_id", "all_reduce_id", "use_global_device_ids"):
        i.ClearField(field)
    if is_single_core and len(i.operand_ids) == 1:
        rewriter.replace(i, rewriter.operands(i)[0])


def _rank_parameter(module: Any) -> bool:
    """Adds a parameter that replaces partition-id, where the program uses that."""
    main = proto.entry(module)
    if not any(i.opcode == "partition-id" for i in main.instructions):
        return False
    identity = 1 + max(i.id for i in main.instructions)
    number = len(proto.parameters(main))
    rank = proto.Instruction(name="rank", opcode="parameter", id=identity, parameter_number=number)
    rank.shape.CopyFrom(proto.shape("int32", (1,)))
    others = list(main.instructions)
    fresh = proto.Computation(instructions=[rank, *others])
    main.ClearField("instructions")
    main.MergeFrom(fresh)
    for program_shape in (main.program_shape, module.host_program_shape):
        program_shape.parameters.append(rank.shape)
        program_shape.parameter_names.append("rank")
    return True


def _rank(rewriter: Rewriter, i: Any) -> None:
    main = proto.entry(rewriter.module)
    if rewriter.computation.id != main.id:
        return
    rank = rewriter.by_id[proto.parameters(main)[-1].id]
    scalar = rewriter.emit("reshape", proto.shape("int32", ()), [rank])
    rewriter.replace(i, rewriter.emit("convert", i.shape, [scalar]))


def _top_k(rewriter: Rewriter, i: Any) -> None:
    """topk(x, k) → custom-call(x), target AwsNeuronTopK, backend_config k, (values, u32 indices)."""
    if not i.largest:
        raise LoweringError("top-k of the smallest values has no Neuron operator: negate the operand")
    values, indices = i.shape.tuple_shapes
    unsigned = proto.shape("uint32", tuple(indices.dimensions))
    call = rewriter.emit(
        "custom-call", proto.tuple_shape([values, unsigned]), rewriter.operands(i),
        custom_call_target=TOP_K, backend_config=str(i.k).encode(), custom_call_api_version=1,
    )  # fmt: skip
    top = rewriter.emit("get-tuple-element", values, [call], tuple_index=0)
    at = rewriter.emit("get-tuple-element", unsigned, [call], tuple_index=1)
    rewriter.become_tuple(i, [top, rewriter.emit("convert", indices, [at])])


def _alias(module: Any, aliases: Mapping[int, int]) -> None:
    is_tuple = proto.root(proto.entry(module)).shape.element_type == proto.TUPLE
    module.ClearField("input_output_alias")
    for output, parameter in sorted(aliases.items()):
        index = [output] if is_tuple else []
        module.input_output_alias.entries.add(
            output_shape_index=index, parameter_number=parameter, kind=proto.MUST_ALIAS
        )


_MODULE_NOTES = (
    "id schedule profile_info device_assignment stack_frame_index buffer_donor frontend_attributes"
    " cross_program_prefetches spmd_output_sharding spmd_parameters_shardings use_auto_spmd_partitioning"
    " original_value_recovery_table"
).split()
_INSTRUCTION_NOTES = (
    "name metadata sharding frontend_attributes statistics_viz original_value parameter_replication"
).split()


def _canonical(module: Any, name: str) -> dict[str, str]:
    """Removes everything that names this run, machine or source tree, and assigns small ids and plain names.

    Computations precede their callers. Equal ones are merged, and unused ones dropped. Returns the source of each
    instruction.
    """
    by_id = {c.id: c for c in module.computations}
    new_ids: dict[int, int] = {}
    id_by_content: dict[bytes, int] = {}
    computations: list[Any] = []
    sources: dict[str, str] = {}
    instruction_count = 0

    def visit(identity: int) -> None:
        nonlocal instruction_count
        computation = by_id[identity]
        for called in (c for i in computation.instructions for c in i.called_computation_ids):
            if called not in new_ids:
                visit(called)
        lines = [_source(module, i) for i in computation.instructions]
        _plain(computation, new_ids)
        content = computation.SerializeToString(deterministic=True)
        if content in id_by_content:
            new_ids[identity] = id_by_content[content]
            return
        computations.append(computation)
        new_ids[identity] = id_by_content[content] = computation.id = len(computations)
        computation.name = "main" if identity == module.entry_computation_id else f"region.{len(computations)}"
        _shift(computation, instruction_count)
        instruction_count += len(computation.instructions)
        sources.update({i.name: line for i, line in zip(computation.instructions, lines, strict=True) if line})

    visit(module.entry_computation_id)
    fresh = proto.Module(computations=computations)
    module.ClearField("computations")
    module.MergeFrom(fresh)
    for field in _MODULE_NOTES:
        module.ClearField(field)
    module.name, module.entry_computation_id, module.entry_computation_name = name, len(computations), "main"
    _name_parameters(module.host_program_shape)
    return sources


def _plain(computation: Any, computation_ids: dict[int, int]) -> None:
    """Renumbers ids from 1 and removes names and metadata, so that equal content gives equal bytes."""
    ids = {i.id: n for n, i in enumerate(computation.instructions, 1)}
    computation.id, computation.name, computation.root_id = 0, "", ids[computation.root_id]
    _name_parameters(computation.program_shape)
    for i in computation.instructions:
        for field in _INSTRUCTION_NOTES:
            i.ClearField(field)
        i.id = ids[i.id]
        i.operand_ids[:] = [ids[o] for o in i.operand_ids]
        i.control_predecessor_ids[:] = [ids[o] for o in i.control_predecessor_ids]
        i.called_computation_ids[:] = [computation_ids[c] for c in i.called_computation_ids]


def _shift(computation: Any, by: int) -> None:
    computation.root_id += by
    for i in computation.instructions:
        i.id += by
        i.name = f"{i.opcode}.{i.id}"
        i.operand_ids[:] = [o + by for o in i.operand_ids]
        i.control_predecessor_ids[:] = [o + by for o in i.control_predecessor_ids]


def _name_parameters(program_shape: Any) -> None:
    program_shape.parameter_names[:] = [f"p{n}" for n in range(len(program_shape.parameters))]


def _source(module: Any, i: Any) -> str | None:
    frames, meta = module.stack_frame_index, i.metadata
    if meta.stack_frame_id:
        at = frames.file_locations[frames.stack_frames[meta.stack_frame_id - 1].file_location_id - 1]
        return f"{frames.file_names[at.file_name_id - 1]}:{at.line}"
    return f"{meta.source_file}:{meta.source_line}" if meta.source_file else None
