"""Damage for fuzzers: the same for the same seed; and limits on the time and memory that a reader may take for it."""

import copy
import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5.0, 1.5 * 2**30
INTERPRETER = 0.5 * 2**30  # of BYTES: what Python takes for itself and what it imports
NUMBERS = (0, 1, 2, 7, 8, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
VALUES = (  # JSON texts, some of which json.dumps does not write
    ["null", "true", "false", "0", "1", "2", "-1", "1.0", "0.5", "1e-5", "1e400", "-1e400", "NaN", "Infinity", "-Infinity"]
    + [str(number) for number in NUMBERS]
    + ["9" * 5000, "1" + "0" * 20, '""', '"x"', '"0"', '"\\u0000"', '"\\ud800"', '"' + "x" * 100_000 + '"', "[]", "{}"]
    + ["[null]", "[1, 2]", "[-1]", '["x"]', "[[1]]", '{"x": 1}', "[" * 100_000 + "]" * 100_000, "[" * 100_000]
    + ['{"x":' * 100_000 + "1" + "}" * 100_000]
)  # fmt: skip
_PLACE = "\0place\0"


def damaged_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """`data` with one to three of: bits flipped, bytes set, a number written over, cut, put in, moved or left out.

    within: how many bytes from the start may change, as where a header is all that is to be damaged.
    """
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = min(len(changed), within or len(changed))
        if not size:
            break
        at, length = rng.randrange(size), rng.randint(1, 16)
        match rng.randrange(7):
            case 0 | 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
                changed[at : at + len(number)] = number[: len(changed) - at]
            case 4:
                del changed[at:]
            case 5:
                changed[at:at] = rng.randbytes(length) if rng.random() < 0.5 else changed[at : at + length]
            case 6:
                del changed[at : at + length]
    return bytes(changed)


def damaged_json(value: Any, rng: random.Random) -> bytes:
    """`value` as JSON text in which one value at any depth is another, or a key is gone, renamed or there twice."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES).encode()
    container, key = rng.choice(places)
    change, twice = rng.randrange(10), "\0twice\0"
    if change == 0:
        del container[key]
    elif change == 1 and isinstance(container, dict):
        container[rng.choice((key + "x", key.upper(), "", "0"))] = container.pop(key)
    elif change == 2 and isinstance(container, dict):
        container[twice] = _PLACE
    elif change == 3:
        container[key] = copy.deepcopy(rng.choice(places)[0])
    else:
        container[key] = _PLACE
    text = json.dumps(value).replace(json.dumps(twice), json.dumps(key))
    return text.replace(json.dumps(_PLACE), rng.choice(VALUES)).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a JSON value, with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@contextmanager
def limits(seconds: float = SECONDS, memory: float = BYTES - INTERPRETER) -> Iterator[None]:
    """Fails where what runs inside takes longer, or more resident memory than there was, at its peak."""
    before = _restart_peak()
    start = time.monotonic()
    yield
    took, grown = time.monotonic() - start, _memory("VmHWM") - before
    assert took < seconds, f"{took:.1f} s"
    assert grown < memory, f"{grown / 2**20:.0f} MiB"


def _restart_peak() -> int:
    """Has the kernel measure peak memory anew (proc(5), clear_refs); returns what is resident now."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    status = Path("/proc/self/status")
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) if status.exists() else 0
