"""Whether the inputs and outputs of a saved program fit its key and its HLO."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from jx_neuron.artifact.manifest import hlo_file
from jx_neuron.config import QuantizationConfig
from jx_neuron.errors import ArtifactError, LoweringError
from jx_neuron.lowering.hlo import proto
from jx_neuron.lowering.signature import ProgramSpec, TensorSpec
from jx_neuron.lowering.verify.operators import CUSTOM_CALLS
from jx_neuron.nn.adapters import PARTS, Adapters, part_of
from jx_neuron.nn.sharding import padded
from jx_neuron.step.program_key import ProgramKey
from jx_neuron.util.parsing import boundary

KINDS = ("param", "state", "input", "rank")  # in the order of a program's inputs
MOST_LAYERS = 1024


def check_fit(
    program: ProgramSpec,
    hlo: bytes,
    key: ProgramKey,
    *,
    slots: int,
    positions: int,
    state: Mapping[str, tuple[int, ...]],
    state_dtypes: Mapping[str, str],
    dtype: np.dtype[Any],
    vocab_size: int,
    quant: QuantizationConfig | None,
    adapters: Adapters | None,
) -> None:
    """Raises ArtifactError unless `program` is the step of `key` (`jx_neuron.step`) and has the signature of `hlo`.

    slots, positions, dtype: those of the state table; `state` gives the shape of one slot of each of its arrays, and
                             `state_dtypes` the dtypes of arrays that have one of their own.
    vocab_size: tokens of the vocabulary; the logits of all cores are padded to a multiple of the number of cores.
    quant: how weights are quantized; None where they are not.
    adapters: the ones that rows name; None where there are none.
    """
    by_kind = {kind: [tensor for tensor in program.inputs if tensor.kind == kind] for kind in KINDS}
    if [tensor for tensors in by_kind.values() for tensor in tensors] != list(program.inputs):
        raise _misfit(program, f"its inputs are not of the kinds {', '.join(KINDS)}, in this order")
    expected = [
        (name, dims, np.dtype(type_).name) for name, (dims, type_) in key.inputs(adapters=adapters is not None).items()
    ]
    if _layouts(by_kind["input"]) != expected or any(set(tensor.partition) - {None} for tensor in by_kind["input"]):
        raise _misfit(program, f"it takes {_listed(by_kind['input'])}, not {expected}")
    if _layouts(by_kind["rank"]) not in ([], [("rank", (1,), "int32")]):
        raise _misfit(program, f"it takes the rank as {_listed(by_kind['rank'])}")
    tables, last = by_kind["state"][:-1], by_kind["state"][-1:]
    if _layouts(last) != [("state.token", (slots,), "int32")]:
        raise _misfit(program, f"its state does not end in the last token of {slots} slots")
    if _numbers(tables) > _numbers(by_kind["param"]) * slots * positions:
        raise _misfit(program, "its state has more numbers a position than the model has parameters")
    rows = [(f"state.{name}", (slots, *shape), state_dtypes.get(name, dtype.name)) for name, shape in state.items()]
    if (actual := _layouts(tables)) != rows:
        others = [tensor for tensor, layout in zip(tables, actual, strict=True) if layout not in rows]
        raise _misfit(
            program,
            f"its state has {_listed(others or tables)}, not {slots} slots of {positions} positions, {dtype.name}, of "
            f"{', '.join(state)}",
        )
    parameters = {tensor.name: tensor for tensor in by_kind["param"]}
    _check_codes(program, parameters, quant, dtype)
    _check_adapters(program, parameters, adapters)
    _check_outputs(program, by_kind["state"], key, vocab_size)
    _check_hlo(program, hlo)


def _check_outputs(program: ProgramSpec, state: Sequence[TensorSpec], key: ProgramKey, vocab_size: int) -> None:
    rows = (key.rows, key.tokens) if key.gives_every else (key.rows,)
    kinds = [tensor.kind for tensor in program.outputs]
    if kinds != ["output", "output", *["state"] * len(state)]:
        raise _misfit(program, f"it gives {_listed(program.outputs)}, not a token, logits and its state")
    token, logits, *states = program.outputs
    if (token.shape, token.dtype) != (key.drawn, "int32"):
        raise _misfit(program, f"its next token is {_listed([token])}")
    split = (*[None] * len(rows), *program.mesh)
    if (logits.shape[:-1], logits.dtype, logits.partition) != (rows, "float32", split):
        raise _misfit(program, f"its logits are {_listed([logits])}")
    if logits.shape[-1] * program.tp_degree != padded(vocab_size, program.tp_degree):
        raise _misfit(program, f"its logits, {_listed([logits])} on each core, are not of {vocab_size} tokens")
    if [program.inputs[tensor.alias] if tensor.alias is not None else None for tensor in states] != list(state):
        raise _misfit(program, "the state that it gives is not in the place of the one that it takes")


def _check_codes(
    program: ProgramSpec, parameters: Mapping[str, TensorSpec], quant: QuantizationConfig | None, dtype: np.dtype[Any]
) -> None:
    paths = [name.removesuffix(".codes") for name in parameters if name.endswith(".codes")]
    if quant and not paths:
        raise _misfit(program, f"its settings have quant_dtype={quant.quant_dtype!r}, and it takes no codes")
    for path in paths:
        parts = {part: parameters.get(f"{path}.{part}") for part in ("codes", "scales", "offsets")}
        stored = {part: tensor.dtype for part, tensor in parts.items() if tensor}
        legal = _stored_forms(path, quant, dtype)
        if stored not in legal:
            forms = " or ".join(map(_described, legal)) or "nothing quantized"
            setting = f"quant_dtype={quant.quant_dtype!r}" if quant else "quant=None"
            raise _misfit(program, f"{path} has {_described(stored)}, where its settings ({setting}) have {forms}")
        if quant and "offsets" in stored:
            codes, scales = (parameters[f"{path}.{part}"] for part in ("codes", "scales"))
            if 2 * math.prod(codes.shape) != (quant.group_size or 0) * math.prod(scales.shape):
                raise _misfit(program, f"{_listed([codes, scales])} are not of group_size={quant.group_size}")


def _check_adapters(program: ProgramSpec, parameters: Mapping[str, TensorSpec], adapters: Adapters | None) -> None:
    """Raises ArtifactError unless there are A and B of `adapters`, and of no others, for each matrix of theirs."""
    actual = {name for name in parameters if name.rpartition(".")[2] in PARTS}
    if adapters is None:
        if actual:
            raise _misfit(program, f"it takes {min(actual)}, and its settings have no adapters")
        return
    matrices = {name.removesuffix(".codes"): 0 for name in parameters}
    paths = adapters.paths(matrices, MOST_LAYERS)
    expected = {part_of(path, part) for path in paths for part in PARTS}
    if not paths or actual != expected:
        raise _misfit(program, f"it has no A and B, or others, where its settings have {len(adapters.names)} adapters")
    for path in paths:
        a, b = (parameters[part_of(path, part)].shape for part in PARTS)
        if (a[0], a[-1], *b[:2]) != (*adapters.sizes.values(), *adapters.sizes.values()):
            raise _misfit(program, f"A and B of {path} are {list(a)} and {list(b)}, not of {adapters.sizes}")


def _stored_forms(path: str, quant: QuantizationConfig | None, dtype: np.dtype[Any]) -> list[dict[str, str]]:
    """The dtypes of codes, scales and offsets that `quant` may store a parameter in; none where it leaves it as it
    is."""
    if quant is None or any(fnmatchcase(path, pattern) for pattern in quant.keep):
        return []
    if path.endswith(".embedding"):
        return [{"codes": "int8", "scales": dtype.name}] if quant.lm_head else []
    int8 = {"codes": "int8", "scales": "float32"}
    return {
        "int8": [int8],
        "fp8": [{"codes": "float8_e4m3", "scales": "float32"}],
        "int4": [{"codes": "uint8", "scales": "float16", "offsets": "float16"}, int8],
    }[quant.kind]


def _described(stored: Mapping[str, str]) -> str:
    return ", ".join(f"{part} {dtype}" for part, dtype in stored.items())


def _check_hlo(program: ProgramSpec, hlo: bytes) -> None:
    path = hlo_file(program.name)
    with boundary(path, ArtifactError):
        try:
            module = proto.parse(hlo)
        except LoweringError as error:
            raise _misfit(program, f"{path} is {error}") from error
        entry = proto.entry(module)
        calls = {i.custom_call_target for i in proto.instructions(module) if i.opcode == "custom-call"}
        takes = [(tuple(i.shape.dimensions), proto.dtype(i.shape)) for i in proto.parameters(entry)]
        gives = [(tuple(leaf.dimensions), proto.dtype(leaf)) for leaf in proto.leaves(proto.root(entry).shape)]
    if unknown := sorted(calls - CUSTOM_CALLS):  # a callback's has an address to call
        raise _misfit(program, f"{path} calls {unknown[0]!r}, which no step does")
    for what, tensors, layouts in (("takes", program.inputs, takes), ("gives", program.outputs, gives)):
        if [(tensor.shape, tensor.dtype) for tensor in tensors] != layouts:
            raise _misfit(program, f"{path} {what} other arrays than the manifest lists")


def _layouts(tensors: Sequence[TensorSpec]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]


def _numbers(tensors: Sequence[TensorSpec]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _listed(tensors: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in tensors[:4]) + (", …" if len(tensors) > 4 else "")


def _misfit(program: ProgramSpec, reason: str) -> ArtifactError:
    return ArtifactError(f"the program {program.name} is not what its name says: {reason}")
