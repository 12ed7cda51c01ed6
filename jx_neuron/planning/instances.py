"""The EC2 instances with NeuronCores, as data.

https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/neuron-instances.html
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/neuron-devices.html
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/trn2-arch.html
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/trn3-arch.html
Tensor-parallel degrees are the ones that the Neuron runtime is documented to support:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/archive/transformers-neuronx/transformers-neuronx-developer-guide.html
(SDK 2.32.)
"""

import dataclasses
import math
from dataclasses import dataclass

from jx_neuron.errors import InputError

GIB = 2**30
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """One accelerator chip.

    target:         the family's name in neuronx-cc.
    cores:          NeuronCores as the runtime counts them: logical ones, of `lnc` physical cores each (the default).
    hbm:            bytes of device memory.
    bandwidth:      of that memory, bytes/s.
    bf16_flops:     dense, per second.
    link:           NeuronLink, bytes/s.
    degrees:        tensor-parallel degrees that the runtime supports.
    ring:           whether devices form a ring.
    switched:       whether a switch links any two devices (trn3). Else they form a hypercube (trn1) or a torus of 4 x 4
                    or 4 x 4 x 4 (trn2), where the longest way among 2^n neighbouring devices is n links.
    inferred:       fields that the source does not state.
    """

    target: str
    cores: int
    lnc: int
    hbm: int
    bandwidth: float
    bf16_flops: float
    link: float
    degrees: tuple[int, ...]
    ring: bool = False
    switched: bool = False
    inferred: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """An instance type, or an UltraServer of several: `devices` of one kind.

    host_memory: bytes of all hosts; None where not published.
    hosts:       instances in it.
    between:     NeuronLink between hosts, bytes/s of a device; None where it is that of the device.
    """

    name: str
    device: Device
    devices: int
    host_memory: int | None
    inferred: tuple[str, ...] = ()
    hosts: int = 1
    between: float | None = None

    @property
    def cores(self) -> int:
        """NeuronCores of all devices."""
        return self.devices * self.device.cores

    @property
    def hbm_per_core(self) -> int:
        """Bytes of device memory of one core."""
        return self.device.hbm // self.device.cores

    @property
    def bandwidth_per_core(self) -> float:
        """Bandwidth of device memory of one core, bytes/s."""
        return self.device.bandwidth / self.device.cores

    @property
    def flops_per_core(self) -> float:
        """Dense bf16 operations per second of one core."""
        return self.device.bf16_flops / self.device.cores

    @property
    def degrees(self) -> tuple[int, ...]:
        """The tensor-parallel degrees that the runtime supports on this instance."""
        return tuple(degree for degree in self.device.degrees if degree <= self.cores)

    def hops(self, tp_degree: int) -> int:
        """Links on the longest path between two of `tp_degree` cores; 1 between cores of one device."""
        devices = math.ceil(tp_degree / self.device.cores)
        across = 1 if self.device.switched else devices // 2 if self.device.ring else (devices - 1).bit_length()
        return max(across, 1) if tp_degree > 1 else 0

    def link(self, tp_degree: int) -> float:
        """NeuronLink among `tp_degree` cores, bytes/s of a device: between hosts where one has fewer."""
        within = tp_degree <= self.cores // self.hosts
        return self.device.link if within or self.between is None else self.between


INF2 = Device("inf2", 2, 1, 32 * GIB, 820 * GIB, 190 * TERA, 192 * GIB, (1, 2, 4, 8, 24), ring=True)
TRN1 = Device("trn1", 2, 1, 32 * GIB, 820 * GIB, 190 * TERA, 384 * GIB, (1, 2, 8, 16, 32))
TRN1N = Device("trn1n", 2, 1, 32 * GIB, 820 * GIB, 190 * TERA, 768 * GIB, (1, 2, 8, 16, 32))
TRN2 = Device("trn2", 4, 2, 96 * GIB, 2.9 * TERA, 667 * TERA, 1.024 * TERA, (1, 2, 4, 8, 16, 32, 64))
TRN2U = dataclasses.replace(TRN2, degrees=(*TRN2.degrees, 128, 256), inferred=("degrees above 64",))
TRN3 = Device(
    *("trn3", 4, 2, 144 * GIB, 4.9 * TERA, 671 * TERA, 2048 * GIB, (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    switched=True,
    inferred=("cores", "degrees"),
)

INSTANCES = (
    Instance("inf2.xlarge", INF2, 1, 16 * GIB),
    Instance("trn1.2xlarge", TRN1, 1, 32 * GIB),
    Instance("inf2.8xlarge", INF2, 1, 128 * GIB),
    Instance("inf2.24xlarge", INF2, 6, 384 * GIB),
    Instance("inf2.48xlarge", INF2, 12, 768 * GIB),
    Instance("trn1.32xlarge", TRN1, 16, 512 * GIB),
    Instance("trn1n.32xlarge", TRN1N, 16, 512 * GIB),
    Instance("trn2.48xlarge", TRN2, 16, 2048 * GIB),
)
"""In the order in which plans try them: by devices, then by host memory. Prices change, so there are none here."""

ULTRASERVERS = (
    Instance("trn2-ultraserver", TRN2U, 64, 8192 * GIB, hosts=4, between=0.256 * TERA),
    Instance("trn3-gen1-ultraserver", TRN3, 64, None, inferred=("host_memory",), hosts=4),
    Instance("trn3-gen2-ultraserver", TRN3, 144, None, inferred=("host_memory",), hosts=36),
)
"""Instances that NeuronLink joins. Fleets may have them; `plan` tries none unless it is named."""

# one device: the sizes of trn3 instances are not in the source, so none is tried unless it is named
TRN3_DEVICE = Instance("trn3", TRN3, 1, None, inferred=("devices", "host_memory"))


def find(name: str) -> Instance:
    """The instance of that name, or the largest of a family ("trn1").

    >>> find("trn1").name, find("inf2.48xlarge").degrees
    ('trn1.32xlarge', (1, 2, 4, 8, 24))

    Raises InputError, which lists the known instances.
    """
    by_name = {instance.name: instance for instance in (*INSTANCES, *ULTRASERVERS, TRN3_DEVICE)}
    family = [instance for instance in INSTANCES if instance.device.target == name]
    match = by_name.get(name) or (family[-1] if family else None)
    if match is None:
        raise InputError(f"instance {name!r} is not known; known are {', '.join(by_name)}")
    return match
