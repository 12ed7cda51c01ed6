"""A strict stand-in for torch-neuronx's runtime classes: what transformers-neuronx does with them is taken.

Anything else is refused.

A NEFF is one that the stand-in for neuronx-cc wrote; its HLO runs through the host runtime's executable. Tensors on
the device are opaque: they are made, written and read through `torch.ops.neuron` alone.

    neuron = install(monkeypatch, cores=32)

    neuron.reads      what was copied to the host, in order: ("executor" or "tensor", ranks, bytes)
    neuron.tensors    every tensor that was made on the device
    neuron.models     every ParallelModel that was loaded
    neuron.joined     as newer versions, an executor gives each output's ranks joined along the first axis

https://github.com/aws-neuron/transformers-neuronx/blob/main/src/transformers_neuronx/compiler.py
"""

import os
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from doubles.neuronx_cc import read_neff

from jx_neuron.lowering.execute import Executable
from jx_neuron.lowering.hlo import proto

DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8_e4m3",
}
VIEWED = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3}  # of the same bits
INTEGERS = {1: torch.int8, 2: torch.int16}


executable = cache(Executable)  # it has no state, and takes seconds to make


class NeuronError(RuntimeError):
    """What the real runtime would answer with an error of its own, or worse."""


def require(condition, message):
    if not condition:
        raise NeuronError(message)


def to_numpy(tensor):
    if tensor.dtype in VIEWED:
        return tensor.view(INTEGERS[tensor.itemsize]).numpy().view(VIEWED[tensor.dtype]).copy()
    return tensor.numpy().copy()


def to_torch(array):
    array = np.array(array)
    for dtype, viewed in VIEWED.items():
        if array.dtype == viewed:
            return torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(dtype)
    return torch.from_numpy(array)


class DeviceTensor:
    """One buffer a core. `arrays` is None where a program took the memory and gave nothing back."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.shape, self.dtype, self.ranks = tuple(arrays[0].shape), arrays[0].dtype.name, len(arrays)

    def read(self):
        require(self.arrays is not None, "the memory of this tensor was consumed by a program")
        return [np.asarray(array) for array in self.arrays]

    def __array__(self, *args, **options):
        raise NeuronError("a tensor on the device is read with _parallel_from_neuron")


class Neuron:
    def __init__(self, cores):
        self.cores, self.initialised, self.joined = cores, False, False
        self.reads, self.tensors, self.models = [], [], []

    def init(self):
        self.initialised = True

    def put(self, tensors):
        self.tensors.append(DeviceTensor(self.taken(tensors)))
        return self.tensors[-1]

    def write(self, tensor, tensors):
        require(isinstance(tensor, DeviceTensor), "not a tensor on the device")
        arrays = self.taken(tensors)
        found = (len(arrays), arrays[0].shape, arrays[0].dtype.name)
        require(found == (tensor.ranks, tensor.shape, tensor.dtype), f"{found} written to {tensor.dtype}{tensor.shape}")
        tensor.arrays = arrays

    def taken(self, tensors):
        require(self.initialised, "_init_neuron() was not called")
        require(isinstance(tensors, list) and 0 < len(tensors) <= self.cores, "one tensor a core is needed, as a list")
        for tensor in tensors:
            require(isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu", "not a CPU tensor")
            require(tensor.dtype in DTYPES and tensor.is_contiguous(), f"{tensor.dtype} tensor, or not contiguous")
            same = (tensor.shape, tensor.dtype) == (tensors[0].shape, tensors[0].dtype)
            require(same, "ranks differ in shape or dtype")
        return [to_numpy(tensor) for tensor in tensors]

    def get(self, tensor):
        require(isinstance(tensor, DeviceTensor), "not a tensor on the device")
        arrays = tensor.read()
        self.reads.append(("tensor", len(arrays), sum(array.nbytes for array in arrays)))
        return [to_torch(array) for array in arrays]

    def run(self, executor, given, return_ranks):
        require(isinstance(executor, ParallelExecutor), "not a ParallelExecutor")
        require(isinstance(given, list) and len(given) == len(executor.user_inputs), "not all user inputs are given")
        require(return_ranks in range(-1, executor.model.tp_degree + 1), f"return_ranks={return_ranks}")
        for tensor, buffer in zip(given, executor.user_inputs, strict=True):
            require(isinstance(tensor, torch.Tensor) and tensor.is_contiguous(), "a user input is no contiguous tensor")
            found = (tuple(tensor.shape), DTYPES.get(tensor.dtype))
            require(found == (buffer.shape, buffer.dtype), f"{found} given for {(buffer.shape, buffer.dtype)}")
            buffer.arrays = [to_numpy(tensor) for _ in range(buffer.ranks)]
        executor.execute()
        count = executor.model.tp_degree if return_ranks == -1 else return_ranks
        shards = [[to_torch(array) for array in tensor.read()[:count]] for tensor in executor.user_outputs]
        self.reads.append(("executor", count, sum(shard.nbytes for ranks in shards for shard in ranks)))
        return [torch.cat(ranks) for ranks in shards] if self.joined else shards


class Neff:
    """A NEFF read: the HLO, its inputs and outputs as (shape, dtype), its aliases, and the ranks that it names."""

    def __init__(self, neff):
        self.flags, self.hlo = read_neff(neff)
        module = proto.parse(self.hlo)
        main = proto.entry(module)
        self.inputs = [described(i.shape) for i in proto.parameters(main)]
        self.outputs = [described(shape) for shape in proto.leaves(proto.root(main).shape)]
        self.aliases = {e.output_shape_index[0]: e.parameter_number for e in module.input_output_alias.entries}
        self.named = {
            rank for i in proto.instructions(module) for group in i.replica_groups for rank in group.replica_ids
        }


class ParallelModel(Neff):
    def __init__(self, neuron, neff, tp_degree, start_device, device_count):
        require(type(neff) is bytes, "the NEFF is no bytes")
        require(neuron.initialised, "_init_neuron() was not called")
        require(start_device >= 0 and start_device + device_count <= neuron.cores, f"there are {neuron.cores} cores")
        require(0 < tp_degree <= device_count, f"{tp_degree} ranks on {device_count} cores")
        self.neuron, self.tp_degree, self.loaded = neuron, tp_degree, False
        super().__init__(neff)
        require(self.named <= set(range(tp_degree)), f"the NEFF is for more than {tp_degree} ranks")

    def load(self):
        require(not self.loaded, "the model is loaded already")
        require(os.environ.get("NEURON_RT_IO_RING_CACHE_SIZE") == "1", "NEURON_RT_IO_RING_CACHE_SIZE is not 1")
        self.executable = executable(self.hlo, self.tp_degree)
        self.loaded = True
        self.neuron.models.append(self)


class ParallelTensorSet:
    def __init__(self, names, tp_degree):
        require(isinstance(names, list) and len(set(names)) == len(names), "names are no list, or not unique")
        self.names, self.tp_degree, self.tensors = names, tp_degree, None

    def init(self):
        require(self.tensors is None, "the tensor set is initialised already")
        self.tensors = [None] * len(self.names)

    def add(self, index, tensor):
        require(self.tensors is not None, "init() was not called")
        require(index in range(len(self.names)), f"there is no tensor {index}")
        require(self.tensors[index] is None, f"{self.names[index]} is there already")
        require(isinstance(tensor, DeviceTensor), f"{self.names[index]} is not on the device")
        require(tensor.ranks == self.tp_degree, f"{self.names[index]} is on {tensor.ranks} cores")
        self.tensors[index] = tensor

    def check(self, prefix, wanted, tp_degree):
        require(self.tensors is not None, "init() was not called")
        require(self.tp_degree == tp_degree, "the tensor set is of another degree")
        names = [f"{prefix}{n}" for n in range(len(wanted))]
        require(self.names == names, f"the NEFF has other names than {self.names}")
        for name, tensor, expected in zip(self.names, self.tensors, wanted, strict=True):
            require(tensor is not None, f"{name} is missing")
            require((tensor.shape, tensor.dtype) == expected, f"{name} is {tensor.dtype}{tensor.shape}, not {expected}")
        require(len(set(map(id, self.tensors))) == len(self.tensors), f"two {prefix}s are one tensor")


class ParallelExecutor:
    def __init__(self, model, inputs, outputs, user_inputs, user_outputs):
        require(isinstance(model, ParallelModel) and model.loaded, "the model is not loaded")
        inputs.check("input", model.inputs, model.tp_degree)
        outputs.check("output", model.outputs, model.tp_degree)
        for number, tensor in enumerate(outputs.tensors):
            at = model.aliases.get(number)
            found = [n for n, other in enumerate(inputs.tensors) if other is tensor]
            require(found == ([] if at is None else [at]), f"output{number} is input {found}, and must be input {at}")
        for tensors, of in ((user_inputs, inputs), (user_outputs, outputs)):
            require(isinstance(tensors, list), "user inputs and outputs are lists")
            require(all(any(t is other for other in of.tensors) for t in tensors), "a user tensor is not in its set")
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.user_inputs, self.user_outputs = user_inputs, user_outputs

    def execute(self):
        executable = self.model.executable
        placed = []
        for tensor in self.inputs.tensors:
            tensor.read()
            placed.append(executable.put(tensor.arrays))
            tensor.arrays = [shard.data for shard in placed[-1].addressable_shards]
        for tensor in self.outputs.tensors:
            tensor.arrays = None
        results = executable.execute(placed)
        for tensor, arrays in zip(self.outputs.tensors, results, strict=True):
            tensor.arrays = arrays


def described(shape):
    return tuple(shape.dimensions), proto.dtype(shape)


def install(monkeypatch: pytest.MonkeyPatch, cores: int = 32) -> Neuron:
    """Puts the stand-in where `import torch_neuronx` puts the real one."""
    neuron = Neuron(cores)
    module = ModuleType("torch_neuronx")
    module.__spec__ = ModuleSpec("torch_neuronx", None)
    monkeypatch.setitem(sys.modules, "torch_neuronx", module)
    monkeypatch.delenv("NEURON_RT_IO_RING_CACHE_SIZE", raising=False)
    operators = SimpleNamespace(
        _init_neuron=neuron.init,
        _parallel_to_neuron=neuron.put,
        _parallel_from_neuron=neuron.get,
        _parallel_write_neuron=neuron.write,
        _parallel_executor_run=neuron.run,
    )
    classes = SimpleNamespace(
        ParallelModel=lambda *arguments: ParallelModel(neuron, *arguments),
        ParallelTensorSet=ParallelTensorSet,
        ParallelExecutor=ParallelExecutor,
    )
    monkeypatch.setattr(torch.ops, "neuron", operators, raising=False)
    monkeypatch.setattr(torch.classes, "neuron", classes, raising=False)
    return neuron
