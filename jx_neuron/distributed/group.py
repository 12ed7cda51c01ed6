"""A group of processes: how they meet, what the first sends to the others, and how all end with the first that dies.

A collective that waits for a process that is gone cannot be interrupted, so a process ends itself when another has.
"""

import itertools
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from typing import NoReturn

import jax
import numpy as np

from jx_neuron import __version__
from jx_neuron.distributed.frames import Message, ProtocolError, receive
from jx_neuron.distributed.hosts import Hosts
from jx_neuron.errors import InputError

START_SECONDS = 300.0
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
"""How long a process may say nothing before it counts as dead."""
END_SECONDS = 5.0

VERSIONS = f"jx_neuron {__version__}, jax {jax.__version__}, jaxlib {version('jaxlib')}"


class Group:
    """The processes of a model, joined: process 0, the leader, sends and the others receive in order.

    coordinator: where processes meet for collectives, in the leader: of `jax.distributed`, or the Neuron runtime.
    """

    def __init__(self, hosts: Hosts):
        self.hosts = hosts
        self.received: queue.Queue[Message] = queue.Queue()
        self._closing, self._sending = threading.Event(), threading.Lock()
        self._numbers = itertools.count()
        self._connections: dict[int, socket.socket] = {}
        self._meetings: dict[int, queue.Queue[tuple[int, Message]]] = {}
        self.coordinator = self._lead() if self.is_leader else self._follow()
        for rank, connection in self._connections.items():
            connection.settimeout(SILENCE_SECONDS)
            threading.Thread(target=self._listen, args=(rank, connection), name="jx-neuron-hosts", daemon=True).start()
        threading.Thread(target=self._beat, name="jx-neuron-heartbeat", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        """Whether this is the process that schedules requests."""
        return self.hosts.rank == 0

    def send(self, message: Message) -> None:
        """Sends a message to each other process, or as one of the others to the leader."""
        data = message.encoded()
        with self._sending:
            for rank, connection in self._connections.items():
                try:
                    connection.sendall(data)
                except OSError as error:
                    self._died(rank, str(error))

    def meeting(self) -> int:
        """Opens a meeting, for the leader. The others come to it by its number."""
        number = next(self._numbers)
        self._meetings[number] = queue.Queue()
        return number

    def come(self, number: int, error: str = "", part: np.ndarray | None = None) -> None:
        """Tells the leader that this process is at a meeting, with its part of an array; or with an error."""
        arrays = {} if part is None else {"part": part}
        self.send(Message("come", {"number": number, "error": error}, arrays))

    def meet(self, number: int) -> list[Message]:
        """Waits until all processes are at a meeting, for the leader. Returns what the others sent, by rank."""
        come = self._meetings[number]
        messages = dict(come.get() for _ in range(self.hosts.count - 1))
        del self._meetings[number]
        return [messages[rank] for rank in sorted(messages)]

    def fail(self, error: Exception) -> NoReturn:
        """Ends all processes after an error of a step. Where that is because a process is gone, the message says so."""
        time.sleep(END_SECONDS)  # meanwhile `_listen` may end the process
        if self._closing.is_set():
            os._exit(0)
        reason = (str(error) or repr(error)).splitlines()[0]
        end(f"process {self.hosts.rank} of {self.hosts.count} failed ({reason}), so all processes end")

    def stop(self) -> None:
        """Asks the leader to end the group, as SIGTERM does."""
        self.send(Message("stop"))

    def close(self) -> None:
        """Ends the group: the others end with status 0. Waits until they have, for `END_SECONDS` at most."""
        if self._closing.is_set():
            return
        self._closing.set()
        with suppress(OSError):
            self.send(Message("close"))
        end = time.monotonic() + END_SECONDS
        while self._connections and time.monotonic() < end:
            time.sleep(0.02)

    def _lead(self) -> str:
        hosts = self.hosts
        address = _address(hosts)
        with socket.create_server(address, family=_family(hosts)) as server:
            end = time.monotonic() + START_SECONDS
            while len(self._connections) < hosts.count - 1:
                server.settimeout(max(0.1, end - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, hosts.count)) - set(self._connections))
                    raise InputError(
                        f"process {missing} of {hosts.count} did not reach {hosts.leader}:{hosts.port} in "
                        f"{START_SECONDS:g} s; start the same command on every host"
                    ) from None
                self._admit(connection)
            with socket.create_server((address[0], 0), family=_family(hosts)) as free:
                port = free.getsockname()[1]
        for connection in self._connections.values():
            connection.sendall(Message("welcome", {"port": port}).encoded())
        return _joined(address[0], port)

    def _admit(self, connection: socket.socket) -> None:
        connection.settimeout(END_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            hello = receive(connection)
        except (OSError, ProtocolError):
            hello = None
        if hello is None or hello.kind != "hello":
            connection.close()
            return
        rank, count, versions = (hello.fields.get(name) for name in ("rank", "count", "versions"))
        reason = ""
        if versions != VERSIONS:
            reason = f"it has {versions}, and process 0 {VERSIONS}; install the same on every host"
        elif count != self.hosts.count or type(rank) is not int or not 0 < rank < self.hosts.count:
            reason = f"it is process {rank} of {count}, and process 0 leads {self.hosts.count}"
        elif rank in self._connections:
            reason = f"process {rank} is there already"
        if reason:
            connection.sendall(Message("refused", {"reason": reason}).encoded())
            connection.close()
            raise InputError(f"a process cannot join: {reason}")
        self._connections[int(rank or 0)] = connection

    def _follow(self) -> str:
        hosts, end = self.hosts, time.monotonic() + START_SECONDS
        while True:
            try:
                connection = socket.create_connection((hosts.leader, hosts.port), timeout=END_SECONDS)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise InputError(
                        f"process 0 cannot be reached at {hosts.leader}:{hosts.port} ({error}); start the same command "
                        "on every host, and let them reach each other"
                    ) from None
                time.sleep(0.1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fields = {"rank": hosts.rank, "count": hosts.count, "versions": VERSIONS}
        connection.sendall(Message("hello", fields).encoded())
        connection.settimeout(START_SECONDS)
        try:
            answer = receive(connection)
        except OSError as error:
            raise InputError(f"process 0 at {hosts.leader}:{hosts.port} does not answer ({error})") from None
        if answer is None or answer.kind != "welcome":
            raise InputError(f"process 0 refuses this one: {answer.fields.get('reason') if answer else 'it has ended'}")
        self._connections[0] = connection
        return _joined(connection.getpeername()[0], int(answer.fields["port"]))

    def _listen(self, rank: int, connection: socket.socket) -> None:
        reason = "it has ended"
        try:
            while (message := receive(connection)) is not None:
                if message.kind == "beat":
                    continue
                if message.kind == "close":
                    self._closing.set()
                    threading.Timer(END_SECONDS, os._exit, (0,)).start()
                    self.received.put(message)
                elif message.kind == "come":
                    self._meetings[message.fields["number"]].put((rank, message))
                elif message.kind == "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    self.received.put(message)
        except TimeoutError:
            reason = f"it has said nothing for {SILENCE_SECONDS:g} s"
        except (OSError, ProtocolError, LookupError) as error:
            reason = str(error)
        if not self._closing.is_set():
            self._died(rank, reason)
        self._connections.pop(rank, None)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            self.send(Message("beat"))

    def _died(self, rank: int, reason: str) -> None:
        if not self._closing.is_set():
            self._closing.set()
            end(f"process {rank} of {self.hosts.count} is gone ({reason}), so all processes end")


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _family(hosts: Hosts) -> socket.AddressFamily:
    return socket.getaddrinfo(hosts.leader, hosts.port, type=socket.SOCK_STREAM)[0][0]


def _address(hosts: Hosts) -> tuple[str, int]:
    try:
        address = socket.getaddrinfo(hosts.leader, hosts.port, type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        raise InputError(f"the host {hosts.leader!r} has no address ({error})") from None
    return str(address[0]), int(address[1])


def end(message: str) -> NoReturn:
    """Ends this process with status 1 and a message, whatever its threads wait for."""
    with suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"jx-neuron: {message}\n".encode())
    os._exit(1)
