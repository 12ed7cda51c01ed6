"""A cache of compiled NEFFs on disk, shared by all processes of the machine.

An entry is one file, `<key>-<sha256 of its content>.neff`. One rename makes it visible, and the hash in its name shows
whether it is whole. A process locks a program's key while compiling it, so that two processes compile it once. The
operating system releases the lock of a process that dies.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import platformdirs
from filelock import FileLock, Timeout

from jx_neuron.errors import CompilerError
from jx_neuron.util.durable import write_file

URL_VARIABLE = "NEURON_COMPILE_CACHE_URL"


class CancelledError(Exception):
    """Waiting for another process's compilation was cancelled."""


def default_folder() -> Path:
    """The folder of `NEURON_COMPILE_CACHE_URL`, or else the user's cache folder.

    Raises CompilerError where the variable names anything but a local folder.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return platformdirs.user_cache_path("jx-neuron") / "neff"
    parts = urlsplit(url)
    if parts.scheme not in ("", "file"):
        raise CompilerError(
            f"{URL_VARIABLE}={url}: compiled programs are cached in local folders only. "
            f"Set it to a path, or unset it to use {platformdirs.user_cache_path('jx-neuron')}"
        )
    return Path(unquote(parts.path) if parts.scheme else url).expanduser() / "jx-neuron"


def key(hlo: bytes, flags: Sequence[str], version: str) -> str:
    """The key of a compilation: sha256 of the program, the flags (with the target) and the compiler's version."""
    parts = [hashlib.sha256(hlo).hexdigest(), list(flags), version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load(folder: Path, key: str) -> bytes | None:
    """The NEFF stored under `key`; None where there is no whole one."""
    for path in folder.glob(f"{key}-*.neff"):
        try:
            neff = path.read_bytes()
        except OSError:  # gone meanwhile, or another user's
            continue
        if path.name == _entry(key, neff):
            return neff
    return None


def store(folder: Path, key: str, neff: bytes) -> None:
    """Stores `neff` under `key`, in place of damaged ones. The caller holds `lock`.

    A failure to store, as on a full disk, is a warning: the compilation itself succeeded.
    """
    try:
        for stale in (*folder.glob(f"{key}-*.neff"), *folder.glob(f".{key}-*.tmp")):
            stale.unlink(missing_ok=True)
        write_file(folder / _entry(key, neff), neff)
    except OSError as error:
        warnings.warn(f"a compiled program cannot be kept in the compile cache {folder}: {error}", stacklevel=2)


@contextmanager
def lock(folder: Path, key: str, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Locks `key` against other processes. Raises CancelledError where `cancelled()` becomes true while waiting."""
    path = folder / f"{key}.lock"
    lock = FileLock(path)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()  # raises where a FileLock would wait, as below /proc
        while not lock.is_locked:
            if cancelled():
                raise CancelledError
            with suppress(Timeout):
                lock.acquire(timeout=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompilerError(
            f"the compile cache {folder} cannot be written ({error.strerror}). Set {URL_VARIABLE} to a folder that can"
        ) from error


def _entry(key: str, neff: bytes) -> str:
    return f"{key}-{hashlib.sha256(neff).hexdigest()}.neff"
