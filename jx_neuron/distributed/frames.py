"""Messages between processes: a header in JSON, and numpy arrays as they are in memory.

length of the header, 4 bytes, big-endian | header | arrays
"""

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jx_neuron.errors import InputError

MOST_HEADER = 2**20
MOST_BYTES = 2**30
DTYPES = ("int32", "float32")


class ProtocolError(InputError):
    """A message is not of this protocol."""


@dataclass(frozen=True)
class Message:
    """A message.

    kind:   what it asks for or tells.
    fields: numbers, texts and lists of them.
    arrays: arrays of `DTYPES`, by name.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """Its bytes."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        listed = [[name, array.dtype.name, array.shape] for name, array in arrays.items()]
        header = json.dumps([self.kind, self.fields, listed]).encode()
        return b"".join([len(header).to_bytes(4, "big"), header, *(array.tobytes() for array in arrays.values())])


def receive(connection: socket.socket) -> Message | None:
    """The next message; None where the connection has ended. Raises ProtocolError for anything else, and OSError."""
    if (length := _read(connection, 4)) is None:
        return None
    if (size := int.from_bytes(length, "big")) > MOST_HEADER:
        raise ProtocolError(f"a message claims a header of {size} bytes; legal are {MOST_HEADER}")
    try:
        kind, fields, listed = json.loads(_read(connection, size) or b"")
        arrays = {}
        for name, dtype, shape in listed:
            count = math.prod(shape)
            if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape) or 4 * count > MOST_BYTES:
                raise ProtocolError(f"a message has an array {name!r} of {dtype}{shape}")
            data = _read(connection, 4 * count) if count else b""
            arrays[name] = np.frombuffer(data or b"", dtype).reshape(shape)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"a message is not of this protocol ({error})") from error
    if type(kind) is not str or type(fields) is not dict:
        raise ProtocolError("a message is not of this protocol")
    return Message(kind, fields, arrays)


def _read(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        if not (part := connection.recv(min(size - len(parts), 2**20))):
            return None
        parts += part
    return bytes(parts)
