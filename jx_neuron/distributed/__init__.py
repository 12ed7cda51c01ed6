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
from jx_neuron.runtime.deployment import choose_backend
from jx_neuron.runtime.nrtpy import ROOT_COMM_ID

__all__ = ["follow", "group", "join"]

_NEVER = 10**6  # seconds: the group notices the dead itself

_group: Group | None = None
_backend = ""
_runtimes: list[tuple[Runtime, str]] = []


def group() -> Group | None:
    """The group that this process has joined; None where it is alone."""
    return _group


def join(hosts: str = AUTO, rank: int | None = None, backend: str | None = None) -> Group:
    """Joins this process with the others, before anything uses JAX; waits until all are there.

    hosts:   "host1,host2" or "host1:port,host2", a process each, the leader first; or "auto" for the processes that
             torchrun, Slurm or a Kubernetes LeaderWorkerSet has started, by their environment.
    rank:    which of the hosts this is; by default the one whose address this machine has.
    backend: of the models, "xla" or "neuron"; by default neuron if there is a device, else xla. `jax.distributed`
             connects the first, and the Neuron runtime the second: at NEURON_RT_ROOT_COMM_ID, which is set here.

    Once a process dies, all others end with status 1 within 30 seconds. Raises InputError where they do not meet.
    """
    global _group, _backend  # noqa: PLW0603
    if _group is not None:
        raise InputError("this process has joined a group already")
    found, _backend = Hosts.of(hosts, rank), choose_backend(backend)
    _group = Group(found)
    atexit.register(_group.close)
    if _backend == "neuron":
        os.environ[ROOT_COMM_ID] = _group.coordinator
        return _group
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


def ranks(backend: str, tp_degree: int) -> range | None:
    """The ranks of a model on backend "neuron" that this process has: those of a host follow those of the host before.

    None where it has all, or where JAX has the devices. Raises InputError where the group cannot share the model.
    """
    if _group is None:
        return None
    if backend != _backend:
        raise InputError(
            f"the processes were joined for backend {_backend!r}, and the model is of {backend!r}; several processes "
            "share models of backend 'xla', and of 'neuron' on NeuronCores. Leave --hosts out for others"
        )
    count = _group.hosts.count
    if tp_degree % count:
        raise InputError(f"{count} processes cannot share tp_degree={tp_degree}; choose a multiple of {count}")
    each = tp_degree // count
    return range(_group.hosts.rank * each, (_group.hosts.rank + 1) * each) if backend == "neuron" else None


def shared(runtime: Runtime, settings: Any, config: Any) -> Runtime:
    """The runtime of a model on all processes: of the leader one that sends each call to the others."""
    if _group is None:
        return runtime
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
