"""One model on the devices of several processes, which may be on several hosts.

from jx_neuron import NeuronAutoModelForCausalLM, distributed

distributed.join("host1,host2")          # the same script in every process
model = NeuronAutoModelForCausalLM.from_pretrained("my-llama", tp_degree=8)
distributed.follow(model)                # returns in the first process alone
print(model.generate("Once upon a time"))
"""

import atexit
import hashlib
import json
import os
import sys
from typing import Any, Protocol

import jax

from jx_neuron.distributed.group import Group, end
from jx_neuron.distributed.hosts import AUTO, Hosts
from jx_neuron.distributed.shared import Follower, Shared
from jx_neuron.errors import InputError, JxNeuronError
from jx_neuron.runtime.base import Runtime

__all__ = ["follow", "group", "join"]

_NEVER = 10**6  # seconds: the group notices the dead itself

_group: Group | None = None
_runtimes: list[tuple[Runtime, str]] = []


def group() -> Group | None:
    """The group that this process has joined; None where it is alone."""
    return _group


def join(hosts: str = AUTO, rank: int | None = None) -> Group:
    """Joins this process with the others, before anything uses JAX; waits until all are there.

    hosts: "host1,host2" or "host1:port,host2", a process each, the leader first; or "auto" for the processes that
           torchrun, Slurm or a Kubernetes LeaderWorkerSet has started, by their environment.
    rank:  which of the hosts this is; by default the one whose address this machine has.

    Once a process dies, all others end with status 1 within 30 seconds. Raises InputError where they do not meet.
    """
    global _group  # noqa: PLW0603
    if _group is not None:
        raise InputError("this process has joined a group already")
    found = Hosts.of(hosts, rank)
    _group = Group(found)
    atexit.register(_group.close)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)  # JAX would abort a process whose leader has ended first
    jax.distributed.initialize(
        _group.coordinator,
        found.count,
        found.rank,
        local_device_ids=None,
        heartbeat_timeout_seconds=_NEVER,
        shutdown_timeout_seconds=1,
    )
    return _group


def shared(runtime: Runtime, settings: Any, config: Any) -> Runtime:
    """The runtime of a model on all processes: of the leader one that sends each call to the others."""
    if _group is None:
        return runtime
    if runtime.programs is not None:
        raise InputError("several processes share models of backend 'xla' alone; leave --hosts out for saved models")
    what = json.dumps([repr(settings), config], sort_keys=True, default=str)
    model = hashlib.sha256(what.encode()).hexdigest()[:16]
    _runtimes.append((runtime, model))
    return Shared(runtime, _group, len(_runtimes) - 1, model) if _group.is_leader else runtime


class _Model(Protocol):
    def to_neuron(self) -> Any: ...


def follow(*models: _Model) -> None:
    """Reads the weights of `models`, the same in every process. In the first process it then returns; in the others it
    runs what the first does until that ends, and then ends with status 0; with 1 after an error."""
    for model in models:
        model.to_neuron()
    if _group is not None and not _group.is_leader:
        try:
            Follower(_group, _runtimes).run()
        except JxNeuronError as error:
            end(f"process {_group.hosts.rank} of {_group.hosts.count} failed: {error}")
        except Exception as error:
            _group.fail(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the interpreter's end would wait for collectives
