"""A strict stand-in for nrtpy: what its documentation says is taken, and anything else is refused.

A NEFF is one that the stand-in for neuronx-cc wrote. Its ranks meet: a program runs, by the host runtime's executable,
once every rank of its group has called it, and a rank that comes alone fails after `PATIENCE` seconds. Of several hosts
each has a process with a stand-in, and the same number of ranks (`doubles.neuron_link`).

    device = install(monkeypatch, cores=32, host=0, hosts=1)

    device.tensors    every tensor that was made on the device
    device.models     every model that was loaded
    device.reads      what was copied to the host, in order: (core, bytes)

https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/nrtpy/index.html
"""

import os
import re
import sys
import threading
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from doubles.neuron_link import Arrays, Link
from doubles.torch_neuronx import Neff, executable

PATIENCE = 20.0
DTYPES = {"float32", "float16", "bfloat16", "int32", "int8", "float8_e4m3"}


class NrtError(RuntimeError):
    """What the real runtime would answer with an error of its own, or worse."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise NrtError(message)


@dataclass(frozen=True)
class TensorMetadata:
    shape: tuple[int, ...]
    size: int


class Tensor:
    """A buffer of one core. `array` is None where a program took the memory and gave nothing back."""

    def __init__(self, device: "Device", array: np.ndarray, name: str | None, core_id: int):
        device.start()
        require(core_id in range(device.visible), f"core {core_id} of {device.visible} that are visible")
        require(isinstance(array, np.ndarray) and array.dtype.name in DTYPES, f"{name} is no array of a known dtype")
        self._device, self.core, self.name = device, core_id, name
        self.array: np.ndarray | None = np.array(array, order="C")
        self.shape, self.dtype = array.shape, array.dtype
        device.tensors.append(self)

    def write_from_numpy(self, array: np.ndarray) -> None:
        require(isinstance(array, np.ndarray), "what is written is no array")
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        if array.nbytes != size:
            raise ValueError(f"{array.nbytes} bytes written to {size}")
        require(array.dtype == self.dtype, f"{array.dtype} written to {self.dtype}")
        self.array = np.array(array, order="C").reshape(self.shape)

    def numpy(self) -> np.ndarray:
        require(self.array is not None, f"the memory of {self.name} was consumed by a program")
        self._device.reads.append((self.core, np.asarray(self.array).nbytes))
        return np.array(self.array)

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise NrtError("a tensor on the device is read with numpy()")


@dataclass(eq=False)
class Group(Neff):
    """The ranks of one NEFF, and the call that they are to meet in."""

    neff: bytes
    world_size: int
    link: Link | None = None
    joined: set[int] = field(default_factory=set)
    calls: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        super().__init__(self.neff)
        require(self.named <= set(range(self.world_size)), f"the NEFF is for more than {self.world_size} ranks")
        self.ranks = range(self.world_size) if self.link is None else self.link.ranks
        if 0 in self.ranks:
            self.executable = executable(self.hlo, self.world_size)
        self.barrier = threading.Barrier(len(self.ranks), action=self.meet)

    def meet(self) -> None:
        """Runs the program on all ranks' tensors."""
        self.error = None
        calls = [self.calls.pop(rank) for rank in self.ranks]
        try:
            taken = [[tensor.array for tensor in inputs.values()] for inputs, _ in calls]
            require(all(array is not None for rank in taken for array in rank), "an input was consumed by a program")
            for _, outputs in calls:
                for tensor in outputs.values():
                    tensor.array = None
            given = self.execute(taken) if self.link is None else self.link.run(self.neff, taken, self.execute)
            for (_, outputs), arrays in zip(calls, given, strict=True):
                for tensor, array in zip(outputs.values(), arrays, strict=True):
                    tensor.array = array
        except BaseException as error:
            self.error = error

    def execute(self, taken: Arrays) -> Arrays:
        """The outputs of all ranks for their inputs."""
        results = self.executable.execute([self.executable.put(ranks) for ranks in zip(*taken, strict=True)])
        return [[np.asarray(array) for array in rank] for rank in zip(*results, strict=True)]


class Model:
    """A NEFF on one core, as rank `rank` of its group."""

    def __init__(self, group: Group, rank: int, core: int):
        self.group, self.rank, self.core = group, rank, core
        self.input_tensors_info = {f"input{n}": metadata(one) for n, one in enumerate(group.inputs)}
        self.output_tensors_info = {f"output{n}": metadata(one) for n, one in enumerate(group.outputs)}

    def __call__(
        self, inputs: dict[str, Tensor], outputs: dict[str, Tensor] | None = None, save_trace: bool = False
    ) -> None:
        require(outputs is not None, "outputs that are made for a call alias no state")
        for prefix, tensors, wanted in (("input", inputs, self.group.inputs), ("output", outputs, self.group.outputs)):
            require(list(tensors) == [f"{prefix}{n}" for n in range(len(wanted))], f"the NEFF has other {prefix}s")
            for (name, tensor), (shape, dtype) in zip(tensors.items(), wanted, strict=True):
                require(isinstance(tensor, Tensor), f"{name} is not on the device")
                require(tensor.core == self.core, f"{name} is on core {tensor.core}, and the model on {self.core}")
                found = tuple(tensor.shape), tensor.dtype.name
                require(found == (tuple(shape), dtype), f"{name} is {found}, not {(tuple(shape), dtype)}")
            require(len(set(map(id, tensors.values()))) == len(tensors), f"two {prefix}s are one tensor")
        for number, tensor in enumerate(outputs.values()):
            at = self.group.aliases.get(number)
            same = [n for n, other in enumerate(inputs.values()) if other is tensor]
            require(same == ([] if at is None else [at]), f"output{number} is input {same}, and must be input {at}")
        self.group.calls[self.rank] = (inputs, outputs)
        try:
            self.group.barrier.wait(PATIENCE)
        except threading.BrokenBarrierError:
            raise NrtError(f"rank {self.rank} waited for others in a collective") from None
        if self.group.error is not None:
            raise self.group.error


class Device:
    """The cores of an instance, and the one runtime of this process."""

    def __init__(self, cores: int, host: int = 0, hosts: int = 1):
        self.host, self.hosts, self._link = host, hosts, None
        self.cores = self.visible = cores
        self.active = False
        self.tensors: list[Tensor] = []
        self.models: list[Model] = []
        self.reads: list[tuple[int, int]] = []
        self._groups: dict[tuple[bytes, int], Group] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """The first operation starts the runtime."""
        self.active = True

    def configure(self, visible_cores: Any = None) -> None:
        if self.active:
            raise RuntimeError("the runtime is active")
        if visible_cores is not None:
            chosen = list(visible_cores)
            require(chosen and max(chosen) < self.cores, f"there are {self.cores} cores")
            os.environ["NEURON_RT_VISIBLE_CORES"] = ",".join(map(str, chosen))
            self.visible = len(chosen)

    def load(
        self,
        neff_path: Path | str,
        name: str | None = None,
        core_id: int = 0,
        cc_enabled: bool = False,
        rank_id: int = 0,
        world_size: int = 1,
    ) -> Model:
        self.start()
        require(core_id in range(self.visible), f"core {core_id} of {self.visible} that are visible")
        require(rank_id in range(world_size), f"rank {rank_id} of {world_size}")
        require(cc_enabled == (world_size > 1), "a group of ranks needs collectives, and one rank none")
        found = os.environ.get("NEURON_RT_ROOT_COMM_ID", "")
        require(world_size == 1 or re.fullmatch(r"[\w.]+:\d+", found), f"NEURON_RT_ROOT_COMM_ID is {found!r}")
        neff = Path(neff_path).read_bytes()
        with self._lock:
            if self.hosts > 1 and self._link is None:
                self._link = Link(self.host, self.hosts, world_size, PATIENCE)
            if (neff, world_size) not in self._groups:
                self._groups[neff, world_size] = Group(neff, world_size, self._link)
            group = self._groups[neff, world_size]
            require(group.ranks[core_id] == rank_id, f"rank {rank_id} on core {core_id} of host {self.host}")
            require(rank_id not in group.joined, f"rank {rank_id} is loaded already")
            group.joined.add(rank_id)
            self.models.append(Model(group, rank_id, core_id))
            return self.models[-1]


def metadata(described: tuple[tuple[int, ...], str]) -> TensorMetadata:
    shape, dtype = described
    return TensorMetadata(tuple(shape), int(np.prod(shape)) * np.zeros(0, dtype).itemsize)


def install(monkeypatch: pytest.MonkeyPatch, cores: int = 32, host: int = 0, hosts: int = 1) -> Device:
    """Puts the stand-in where `import nrtpy` finds it."""
    device, module = Device(cores, host, hosts), ModuleType("nrtpy")
    for name in ("NEURON_RT_ROOT_COMM_ID", "NEURON_RT_VISIBLE_CORES", "NEURON_RT_IO_RING_CACHE_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)

    class NrtpyTensor:
        @staticmethod
        def from_numpy(array: np.ndarray, name: str | None = None, core_id: int = 0) -> Tensor:
            return Tensor(device, array, name, core_id)

    class NrtpyModel:
        load_from_neff = staticmethod(device.load)

    module.__spec__ = ModuleSpec("nrtpy", None)
    module.NrtpyTensor, module.NrtpyModel, module.configure = NrtpyTensor, NrtpyModel, device.configure
    monkeypatch.setitem(sys.modules, "nrtpy", module)
    return device
