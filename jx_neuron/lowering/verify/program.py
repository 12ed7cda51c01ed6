"""Rules on the program as a whole: its collectives, aliases, size and memory."""

from __future__ import annotations

from collections.abc import Iterator

from jx_neuron.lowering.hlo.graph import Instruction, Module
from jx_neuron.lowering.hlo.proto import COLLECTIVES
from jx_neuron.lowering.verify.footprint import engine_instructions, peak_bytes, resident_bytes
from jx_neuron.lowering.verify.rules import GIB, Finding, Target, module_rule, rule, strip

MAX_INSTRUCTIONS = 5_000_000  # EVRF007: "exceeds the typical limit of 5,000,000"
MAX_ID = 2**31 - 1
THREEFRY_PARITY = 0x1BD11BDA  # the key schedule constant of threefry2x32
_GROUPED = COLLECTIVES - {"collective-permute"}
_LEGALIZE = "lower it with jx_neuron.lowering, whose legalization does this"


@module_rule(
    "logical-cores", "EARG001",
    title="A logical core configuration that the target does not have",
    advice="leave --logical-nc-config out, or give one that the target has",
)  # fmt: skip
def logical_cores(module: Module, target: Target) -> Iterator[Finding]:
    """A logical NeuronCore is one physical core on inf2 and trn1, one or two on trn2 and trn3 (two by
    default)."""
    if target.lnc not in target.lnc_choices:
        allowed = " or ".join(map(str, target.lnc_choices))
        yield None, f"is asked for at LNC {target.lnc}, but {target.name} has LNC {allowed}"


@rule(
    "partition-id",
    ops=["partition-id", "replica-id"],
    title="The program asks which core it runs on",
    advice=f"make the rank an input; {_LEGALIZE}",
)  # fmt: skip
def partition_id(i: Instruction, target: Target) -> str | None:
    """No code is documented: every core loads the same NEFF, so its rank has to come in as data."""
    return f"is {i.opcode}"


@rule(
    "channel-id",
    ops=COLLECTIVES,
    title="A collective with a channel id",
    advice=f"write the collective over replicas, without a channel; {_LEGALIZE}",
)  # fmt: skip
def channel_id(i: Instruction, target: Target) -> str | None:
    """No code is documented: the programs that Neuron's own tools emit use cross-replica collectives, with
    neither channel ids nor global device ids."""
    if i.proto.channel_id > 0:
        return f"has the channel id {i.proto.channel_id}"
    return "uses global device ids" if i.proto.use_global_device_ids else None


@rule(
    "replica-groups",
    ops=_GROUPED,
    title="A collective without explicit, dense replica groups",
    advice=f"write out every rank from 0 to n-1 once, in groups of one size; {_LEGALIZE}",
)  # fmt: skip
def replica_groups(i: Instruction, target: Target) -> str | None:
    """No code is documented. Groups have to be in the proto's field 49, `replica_groups`: newer XLA writes
    others alone, and an older reader takes that for no groups at all."""
    groups = [list(g.replica_ids) for g in i.proto.replica_groups]
    if not groups:
        newer = any(map(i.proto.HasField, ("collective_device_list", "iota_groups", "mesh_groups")))
        return "has its replica groups only where older readers do not look" if newer else "has no replica groups"
    ranks = sorted(rank for group in groups for rank in group)
    if ranks != list(range(len(ranks))) or len({len(group) for group in groups}) > 1:
        return f"has the replica groups {groups}"
    return None


@module_rule(
    "instruction-ids",
    title="Instruction ids above 2147483647",
    advice=f"number instructions from 1 on; {_LEGALIZE}",
)  # fmt: skip
def instruction_ids(module: Module, target: Target) -> Iterator[Finding]:
    """No code is documented. Newer XLA numbers instructions (computation << 32 | n), and older readers refuse
    ids that do not fit 32 bits. Reported once."""
    for i in module.instructions:
        if i.proto.id > MAX_ID:
            yield i, f"has the id {i.proto.id}"
            return


@module_rule(
    "threefry",
    title="Random numbers by threefry",
    advice='use jax.config.update("jax_default_prng_impl", "rbg"), or take random numbers as inputs',
    severity="warning",
)  # fmt: skip
def threefry(module: Module, target: Target) -> Iterator[Finding]:
    """No code is documented: threefry, JAX's default, is listed as not completely supported. Found by its key
    schedule constant, and reported once."""
    for i in module.instructions:
        if i.opcode == "xor" and any(_is_parity(o) for o in i.operands):
            yield i, "is part of a threefry2x32 random number generator"
            return


def _is_parity(i: Instruction) -> bool:
    i = strip(i)
    return i.opcode == "constant" and THREEFRY_PARITY in i.proto.literal.u32s


@module_rule(
    "donated-not-aliased",
    title="A donated input shares its buffer with no output",
    advice="return it updated, with the same shape and type, so that the write is in place",
    severity="warning",
)  # fmt: skip
def donated_not_aliased(module: Module, target: Target) -> Iterator[Finding]:
    """A donated input that no output aliases takes its memory twice: a state table would not be updated in place."""
    parameters = module.entry.parameters
    for entry in module.proto.buffer_donor.entries:
        if entry.parameter_number not in module.aliases:
            donor = parameters[entry.parameter_number]
            yield donor, f"is a donated input, {donor.shape}, aliased with no output"


@module_rule(
    "read-after-write",
    title="An aliased input is read after it was overwritten",
    advice="read the updated value instead, or read the input before it is written",
    severity="warning",
)  # fmt: skip
def read_after_write(module: Module, target: Target) -> Iterator[Finding]:
    """An input that shares its buffer with an output (an array of the state table) is written in place. An
    instruction that reads both the old value and something computed from the new one forces a copy of the whole
    array, or reads overwritten values."""
    entry = module.entry
    writes = {p: w for p in entry.parameters if (w := _write(module, p)) is not None}
    bits = {w: 1 << n for n, w in enumerate(writes.values())}
    after: dict[Instruction, int] = {}
    views = {p: p for p in writes}
    for i in entry.instructions:
        after[i] = bits.get(i, 0)
        for operand in i.operands:
            after[i] |= after[operand]
        for operand in i.operands:
            if operand in views and i.opcode in ("bitcast", "reshape"):
                views[i] = views[operand]
            elif operand in views and i is not entry.root:
                parameter = views[operand]
                write = writes[parameter]
                if i is not write and after[i] & bits[write]:
                    yield i, f"reads input {parameter.name} after {write.name} has overwritten it"


def _write(module: Module, parameter: Instruction) -> Instruction | None:
    """The instruction that first overwrites an aliased parameter, if one does."""
    output = module.aliases.get(parameter.proto.parameter_number)
    if output is None:
        return None
    root = module.entry.root
    result = strip(root.operands[output] if root.opcode == "tuple" else root, ("bitcast", "reshape"))
    node, write = result, None
    while node.opcode in ("dynamic-update-slice", "scatter"):
        write, node = node, strip(node.operands[0], ("bitcast", "reshape"))
    if node is parameter:
        return write
    return result


@module_rule(
    "device-memory", "EOOM001", "EOOM002", "EVRF009", "EXSP001",
    title="The program does not fit the memory of a core",
    advice="use a larger tp degree, a smaller batch size or n_positions, or 16-bit weights",
)  # fmt: skip
def device_memory(module: Module, target: Target) -> Iterator[Finding]:
    """Inputs (weights and state), outputs that are not aliased, constants, and the largest set of live
    intermediate results, against the HBM of one logical core. Results of element-wise operations are not counted
    (they fuse), nor is memory of the runtime itself. The sum is a lower bound: a program that is reported does not
    fit, and one that is not reported may still not fit."""
    resident, live = resident_bytes(module) / GIB, peak_bytes(module.entry) / GIB
    room = target.hbm_bytes / GIB
    if resident + live > room:
        parts = f"{resident:.1f} of inputs, outputs and constants, {live:.1f} of intermediate results"
        has = f"a core of {target.name} at LNC {target.lnc} has {room:g}"
        yield None, f"needs at least {resident + live:.1f} GiB on each core ({parts}); {has}"


@module_rule(
    "instruction-count", "EVRF007", "EBVF030", "EXTP004",
    title="The program may become too many instructions",
    advice="use a larger tp degree, smaller context buckets or batch sizes, or --optlevel=1",
    severity="warning",
)  # fmt: skip
def instruction_count(module: Module, target: Target) -> Iterator[Finding]:
    """An estimate. neuronx-cc gives up beyond a "typical limit of 5,000,000" engine instructions. A dot is
    counted as one instruction for each 128 x 128 x 512 tile, anything else as one for each 128 x 512
    elements, loops unrolled; moving data between memories is not counted."""
    count = engine_instructions(module.entry)
    if count > MAX_INSTRUCTIONS:
        yield None, f"is estimated at {count / 1e6:.1f} million engine instructions; the limit is 5 million"
