"""Which processes a model is spread over, and which of them this is."""

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jx_neuron.errors import InputError

PORT = 47100
AUTO = "auto"
LAUNCHERS = "torchrun's RANK, WORLD_SIZE and MASTER_ADDR, Slurm's SLURM_PROCID, or LeaderWorkerSet's LWS_LEADER_ADDRESS"


@dataclass(frozen=True)
class Hosts:
    """The processes of a group.

    leader: name or address of the host of process 0, and `port` where it listens to the others.
    count:  processes.
    rank:   the number of this one.
    """

    leader: str
    port: int
    count: int
    rank: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.count and 0 < self.port < 65536):
            raise InputError(f"process {self.rank} of {self.count} at port {self.port} is not legal; the first is 0")

    @classmethod
    def of(cls, hosts: str, rank: int | None = None, environment: Mapping[str, str] = os.environ) -> "Hosts":
        """The hosts that `--hosts` names: "host1:port,host2", or "auto" for those of a launcher.

        rank: which of them this is; by default the one whose address this machine has.

        Raises InputError where they cannot be told.
        """
        if hosts == AUTO:
            return cls.of_launcher(environment)
        names = [name.strip() for name in hosts.split(",")]
        leader, _, port = names[0].partition(":")
        if not all(names) or not leader or (port and not port.isdecimal()):
            raise InputError(f"--hosts {hosts!r} is not legal; write host1,host2 or host1:port,host2, or {AUTO}")
        if rank is None:
            own = [number for number, name in enumerate(names) if _is_here(name.partition(":")[0])]
            if len(own) != 1:
                raise InputError(
                    f"{len(own)} of the hosts {hosts} have an address of this machine; say which is this process "
                    "with --host-rank"
                )
            rank = own[0]
        return cls(leader, int(port or PORT), len(names), rank)

    @classmethod
    def of_launcher(cls, environment: Mapping[str, str]) -> "Hosts":
        """The processes that a launcher has started, by its environment. Raises InputError where it has none."""

        def number(name: str) -> int:
            if not environment.get(name, "").isdecimal():
                raise InputError(f"{name}={environment.get(name)!r} is no number; the launcher sets it")
            return int(environment[name])

        # https://docs.pytorch.org/docs/stable/elastic/run.html: its store listens at MASTER_PORT
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
            port = number("MASTER_PORT") + 1 if "MASTER_PORT" in environment else PORT
            return cls(environment["MASTER_ADDR"], port, number("WORLD_SIZE"), number("RANK"))
        # https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/
        if "LWS_LEADER_ADDRESS" in environment:
            return cls(environment["LWS_LEADER_ADDRESS"], PORT, number("LWS_GROUP_SIZE"), number("LWS_WORKER_INDEX"))
        # https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
        if "SLURM_PROCID" in environment:
            nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
            port = PORT + number("SLURM_JOB_ID") % 1000
            return cls(first_node(nodes), port, number("SLURM_NTASKS"), number("SLURM_PROCID"))
        raise InputError(f"there is no launcher: none of {LAUNCHERS} is set. Name the hosts instead of {AUTO}")


def first_node(nodes: str) -> str:
    """The first node of Slurm's list.

    >>> first_node("trn-[012-015,18],login")
    'trn-012'
    """
    if (match := re.match(r"([^,[\]]+)(?:\[(\d+)[^\]]*\]([^,[\]]*))?", nodes)) is None:
        raise InputError(f"SLURM_JOB_NODELIST={nodes!r} names no node")
    return "".join(part or "" for part in match.groups())


def _is_here(name: str, resolve: Callable[..., Sequence[tuple]] = socket.getaddrinfo) -> bool:  # type: ignore[type-arg]
    """Whether a name's address is one of this machine: one that a socket can be bound to."""
    try:
        found = resolve(name, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"the host {name!r} has no address ({error}); name hosts as they can be reached") from None
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(address)
            return True
        except OSError:
            continue
    return False
