"""A strict stand-in for AWS's neuronx-cc: what its documentation lists is taken, everything else refused.

It reads the module it is given down to the wire format, with no code of the package and no XLA, refuses
what the real one is known to refuse, and writes a file that `read_neff` takes apart again.
`install(folder)` puts it into a folder as `neuronx-cc`. Environment variables tell how it behaves:

  NEURONX_CC_DOUBLE_LOG=folder        a line of JSON each in folder/invocations.jsonl: pid, argv, module
  NEURONX_CC_DOUBLE_FAIL=code[:text]  fails with NCC_<code>, if the module's name holds `text`
  NEURONX_CC_DOUBLE_HANG=text         if the name holds `text`, writes half a NEFF, starts a stubborn child, hangs
  NEURONX_CC_DOUBLE_MEET=n            goes on only once n compilations run at the same time
  NEURONX_CC_DOUBLE_WAIT=path         goes on only once `path` exists
  NEURONX_CC_DOUBLE_VERSION=text      the version that it claims

https://awsdocs-neuron.readthedocs-hosted.com/en/latest/compiler/neuronx-cc/api-reference-guide/
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MAGIC = b"STAND-IN NEFF\n"
INT_MAX = 2**31 - 1
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"}
UNSUPPORTED = {"partition-id", "topk", "infeed", "outfeed", "send", "recv", "fft", "conditional", "cholesky"}
CUSTOM_CALLS = {
    *(f"AwsNeuron{name}" for name in (
        "Erf", "Gelu", "GeluApprxTanh", "GeluBackward", "Silu", "SiluBackward", "RmsNorm", "Softmax",
        "SoftmaxBackward", "CollectiveMatmul", "IntMatmult", "ArgMax", "ArgMin", "TopK", "DropoutMaskV1",
        "CustomNativeKernel", "CustomOp", "DevicePrint", "LNCShardingConstraint", "TransferWithStaticRing",
        "ModuleMarkerStart-Forward", "ModuleMarkerStart-Backward", "ModuleMarkerEnd-Forward",
        "ModuleMarkerEnd-Backward",
    )),
    "ResizeNearest", "ResizeBilinear", "ResizeNearestGrad",
    "NeuronBoundaryMarker-Start", "NeuronBoundaryMarker-End",
}  # fmt: skip


def install(folder: Path) -> Path:
    """Puts the stand-in into `folder` as the executable `neuronx-cc`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "neuronx-cc"
    python, script = shlex.quote(sys.executable), shlex.quote(str(Path(__file__).resolve()))
    path.write_text(f'#!/bin/sh\nexec {python} -I {script} "$@"\n')
    path.chmod(0o755)
    return path


def read_neff(neff: bytes) -> tuple[dict[str, Any], bytes]:
    """The flags that a NEFF of the stand-in was compiled with, and its HLO."""
    magic, told, hlo = neff[: len(MAGIC)], *neff[len(MAGIC) :].split(b"\n", 1)
    if magic != MAGIC:
        raise ValueError("not a NEFF of the stand-in")
    flags = json.loads(told)
    if len(hlo) != flags.pop("size"):
        raise ValueError("the NEFF is cut short")
    return flags, hlo


def invocations(log: Path) -> list[dict[str, Any]]:
    """The compilations that ran with NEURONX_CC_DOUBLE_LOG=`log`."""
    path = log / "invocations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fields(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message by number: integers, and bytes where they have a length."""
    found = defaultdict(list)
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
        elif kind in (1, 2, 5):
            size, at = varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("the message is cut short")
        else:
            raise ValueError(f"wire type {kind} is none of protobuf's")
        found[tag >> 3].append(value)
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the message is cut short")
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number has no end")


def integers(values: list[Any]) -> list[int]:
    """A repeated integer field, packed or not."""
    found = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = varint(value, at)
            found.append(number)
    return found


def check(hlo: bytes) -> str:
    """The name of a serialized HloModuleProto (xla/service/hlo.proto); what is none is refused."""
    try:
        module = fields(hlo)
        name = module[1][0].decode()
        computations = [fields(computation) for computation in module[3]]
        ids = [computation[5][0] for computation in computations]
        if module[6][0] not in ids or not module[4]:
            fail("EVRF064", "the module has no entry computation or no program shape")
        for computation in computations:
            body = [fields(instruction) for instruction in computation[2]]
            defined = [instruction[35][0] for instruction in body]
            if len(set(defined)) < len(defined) or max([*defined, *ids]) > INT_MAX:
                fail("EVRF064", "instruction ids are not unique, or above INT_MAX")
            if computation[6][0] not in defined:
                fail("EVRF064", "a computation's root is not among its instructions")
            for instruction in body:
                check_instruction(instruction, set(defined), set(ids))
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        fail("EVRF064", f"the input is no HloModuleProto: {error}")
    return name


def check_instruction(instruction: dict[int, list[Any]], defined: set[int], computations: set[int]) -> None:
    name, opcode = instruction[1][0].decode(), instruction[2][0].decode()
    for operand in integers(instruction[36]):
        if operand not in defined:
            fail("EVRF064", f"{name} takes the result of an instruction that is not there")
    for called in integers(instruction[38]):
        if called not in computations:
            fail("EVRF064", f"{name} calls a computation that is not there")
    if opcode in UNSUPPORTED:
        fail("EVRF001", f"{name}: {opcode} is not supported")
    if opcode == "custom-call" and instruction[28][0].decode() not in CUSTOM_CALLS:
        fail("EVRF015", f"{name}: {instruction[28][0].decode()} is not a recognized custom call")
    if opcode in COLLECTIVES:
        groups = [integers(fields(group)[1]) for group in instruction[49]]
        if not groups or not all(groups) or len({len(group) for group in groups}) > 1:
            fail("EVRF064", f"{name} has no dense replica groups")
        if any(instruction[26]):
            fail("EVRF064", f"{name} has a channel id")


def fail(code: str, message: str) -> NoReturn:
    print(f"[ERROR] [NCC_{code}] {message}", file=sys.stderr)
    sys.exit(70)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("neuronx-cc", allow_abbrev=False, add_help=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list-operators", allow_abbrev=False, add_help=False).add_argument(
        "--framework", choices=["XLA"], required=True
    )
    c = commands.add_parser("compile", allow_abbrev=False, add_help=False)
    c.add_argument("model", type=Path)
    c.add_argument("--framework", choices=["XLA"], required=True)
    c.add_argument("--target", choices=["inf2", "trn1", "trn1n", "trn2", "trn3"], required=True)
    c.add_argument("--model-type", choices=["generic", "transformer", "unet-inference"], default="generic")
    c.add_argument("--auto-cast", choices=["none", "matmult", "all"], default="none")
    c.add_argument("--auto-cast-type", choices=["bf16", "fp16", "tf32", "fp8_e4m3"], default="bf16")
    c.add_argument("--native-int64", choices=["default", "enabled", "disabled"])
    c.add_argument("--implicit-integer-downcast")
    c.add_argument("--distribution-strategy", choices=["llm-training"])
    c.add_argument("--logical-nc-config", "-lnc", "--lnc", type=int, choices=[1, 2])
    c.add_argument("--optlevel", "-O", type=int, choices=[1, 2, 3], default=2)
    c.add_argument("--enable-mixed-precision-accumulation", action="store_true")
    c.add_argument("--disable-mixed-precision-accumulation", action="store_true")
    c.add_argument("--enable-saturate-infinity", action="store_true")
    c.add_argument("--enable-fast-context-switch", action="store_true")
    c.add_argument("--enable-fast-loading-neuron-binaries", action="store_true")
    c.add_argument("--logfile", type=Path, default=Path("log-neuron-cc.txt"))
    c.add_argument("--output", type=Path, default=Path("file.neff"))
    c.add_argument("--verbose", choices=["info", "warning", "error", "critical", "debug"], default="warning")
    told = parser.parse_args(argv)
    if told.command == "compile" and told.logical_nc_config and told.target not in ("trn2", "trn3"):
        fail("EARG001", f"logical-nc-config is not supported on {told.target}")
    return told


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"waited in vain for {what}")
        time.sleep(0.01)


def main(argv: list[str]) -> None:
    if argv == ["--version"]:
        version = os.environ.get("NEURONX_CC_DOUBLE_VERSION", "2.21.18209.0+043b1bf7")
        print(f"NeuronX Compiler version {version}\n\nPython version 3.11.7\nHWM version 2.21.0.0")
        return
    told = arguments(argv)
    if told.command == "list-operators":
        print("\n".join(["Add", "AllReduce", "Dot"]))
        return
    hlo = told.model.read_bytes()
    name = check(hlo)
    told.logfile.write_text(f"INFO: Compiling {name} for {told.target}\n")
    if log := os.environ.get("NEURONX_CC_DOUBLE_LOG"):
        line = json.dumps({"pid": os.getpid(), "argv": argv, "module": name}) + "\n"
        with open(Path(log) / "invocations.jsonl", "a") as file:
            file.write(line)
        (Path(log) / f"running-{os.getpid()}").touch()
        count = int(os.environ.get("NEURONX_CC_DOUBLE_MEET", "1"))
        wait_for(lambda: len(list(Path(log).glob("running-*"))) >= count, f"{count} compilations at a time")
    if gate := os.environ.get("NEURONX_CC_DOUBLE_WAIT"):
        wait_for(Path(gate).exists, gate)
    code, _, text = os.environ.get("NEURONX_CC_DOUBLE_FAIL", "").partition(":")
    if code and text in name:
        fail(code, f"{name} cannot be compiled")
    flags = {k: v for k, v in vars(told).items() if k not in ("command", "model", "logfile", "output")}
    neff = MAGIC + json.dumps({**flags, "size": len(hlo)}).encode() + b"\n" + hlo
    hang = os.environ.get("NEURONX_CC_DOUBLE_HANG")
    if hang and hang in name:
        told.output.write_bytes(neff[: len(neff) // 2])
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        child.stdout.readline()  # it ignores SIGTERM from here on
        if log:
            (Path(log) / f"hanging-{os.getpid()}").write_text(str(child.pid))
        child.wait()
    told.output.write_bytes(neff)
    print("Compiler status PASS")


if __name__ == "__main__":
    main(sys.argv[1:])
