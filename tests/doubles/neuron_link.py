"""Collectives between hosts, for the stand-in for nrtpy: its ranks meet at NEURON_RT_ROOT_COMM_ID, and nowhere else.

The host of rank 0 listens there. It runs each program for the ranks of all hosts, once all have called the same one.
"""

import hashlib
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jx_neuron.distributed.frames import Message, receive

Arrays = list[list[np.ndarray]]  # of each rank, each tensor


class LinkError(RuntimeError):
    """The ranks of the hosts do not meet."""


class Link:
    """The hosts of a group of `world` ranks; host `host` of `hosts` has `ranks`."""

    def __init__(self, host: int, hosts: int, world: int, seconds: float):
        each, self.world, self.root = world // hosts, world, os.environ.get("NEURON_RT_ROOT_COMM_ID", "")
        self.ranks = range(host * each, (host + 1) * each)
        address, _, port = self.root.rpartition(":")
        if each * hosts != world or not port.isdecimal():
            raise LinkError(f"{world} ranks of {hosts} hosts cannot meet at {self.root!r}")
        self.others: dict[int, socket.socket] = {}
        self.joined: dict[int, list[int]] = {}
        if host:
            self.leader = connected((address, int(port)), seconds)
            self._send(self.leader, "hello", host=host, world=world, ranks=[*self.ranks], root=self.root)
            return
        with socket.create_server((address, int(port))) as server:
            server.settimeout(seconds)
            while len(self.others) < hosts - 1:
                connection, _ = server.accept()
                connection.settimeout(seconds)
                self._admit(connection)
        members = [*self.ranks, *(rank for ranks in self.joined.values() for rank in ranks)]
        if sorted(members) != [*range(world)]:
            raise LinkError(f"the ranks {members} are not {world}, each once")

    def _admit(self, connection: socket.socket) -> None:
        hello = self._receive(connection, "hello").fields
        if (hello["world"], hello["root"]) != (self.world, self.root) or hello["host"] in self.others:
            raise LinkError(f"{hello} does not belong to the {self.world} ranks of {self.root}")
        self.others[hello["host"]] = connection
        self.joined[hello["host"]] = hello["ranks"]

    def run(self, neff: bytes, own: Arrays, execute: Any) -> Arrays:
        """The outputs of this host's ranks, for their inputs; `execute` takes the inputs of all ranks, in order."""
        name = hashlib.sha256(neff).hexdigest()
        if not self.others:
            self._send(self.leader, "call", own, neff=name)
            return self._arrays(self._receive(self.leader, "result"), len(own))
        calls = {host: self._receive(connection, "call") for host, connection in sorted(self.others.items())}
        if any(call.fields["neff"] != name for call in calls.values()):
            raise LinkError("the hosts run different programs")
        all_ranks = own + [rank for call in calls.values() for rank in self._arrays(call, len(own))]
        results = execute(all_ranks)
        for host in calls:
            ranks = self.joined[host]
            self._send(self.others[host], "result", results[ranks[0] : ranks[-1] + 1])
        return results[: len(own)]

    def _send(self, connection: socket.socket, kind: str, own: Sequence[Any] = (), **fields: Any) -> None:
        arrays = {f"{r}.{n}": np.asarray(array) for r, rank in enumerate(own) for n, array in enumerate(rank)}
        connection.sendall(Message(kind, fields, arrays).encoded())

    def _receive(self, connection: socket.socket, kind: str) -> Message:
        message = receive(connection)
        if message is None or message.kind != kind:
            raise LinkError(f"a host has ended, or sent {message} in place of a {kind}")
        return message

    def _arrays(self, message: Message, ranks: int) -> Arrays:
        parts: Arrays = [[] for _ in range(ranks)]
        for name, array in message.arrays.items():
            parts[int(name.partition(".")[0])].append(array)
        return parts


def connected(address: tuple[str, int], seconds: float) -> socket.socket:
    """A connection to a host that may begin to listen later."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=seconds)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
