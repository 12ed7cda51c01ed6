"""Atomic writes of files and folders: each is whole or absent, whenever the process or the machine dies."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

PATIENCE = 5.0  # seconds to wait for renames of another process, which take microseconds
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_unfinished: dict[Path, Path] = {}  # lock of this process → the folder that it replaces


def sync(path: Path) -> None:
    """Forces a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes `path` atomically: a temporary sibling, fsync, rename."""
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which replaces `folder` when the block ends without an error.

    Two renames do it: `folder` is set aside, and the new one takes its name. After a process killed in between,
    `settle` restores the old folder. Of several processes that replace one folder, the last to end wins.
    The caller calls `sync` on files in the new folder. Raises OSError where the disk does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.{uuid4().hex}.lock")
    lock.touch()  # raises where a FileLock would wait, as below /proc
    fresh = lock.with_suffix(".tmp")
    with FileLock(lock, timeout=PATIENCE):
        _unfinished[lock] = folder
        try:
            recover(folder)
            fresh.mkdir()
            yield fresh
            for inner in (*filter(Path.is_dir, fresh.rglob("*")), fresh):
                sync(inner)
            _put_in_place(fresh, folder, lock)
            sync(folder.parent)
        finally:
            _clear(folder, lock)
            lock.unlink(missing_ok=True)
            del _unfinished[lock]


def abandon() -> None:
    """Undoes every unfinished `replacing` of this process; for the thread that ends it while others work."""
    for lock, folder in list(_unfinished.items()):
        _clear(folder, lock)
        lock.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Restores `folder` where a process died while replacing it, and waits for one that is replacing it now.

    Raises OSError where the system cannot look the path up.
    """
    deadline = time.monotonic() + PATIENCE
    while not folder.exists() and any(_beside(folder, ".old")) and time.monotonic() < deadline:
        recover(folder)
        time.sleep(0.01)


def _put_in_place(fresh: Path, folder: Path, lock: Path) -> None:
    while True:
        try:
            fresh.rename(folder)
            return
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise
        _discard(lock.with_suffix(".old"), lock)
        with suppress(FileNotFoundError):  # another process has just set it aside
            folder.rename(lock.with_suffix(".old"))


def recover(folder: Path) -> None:
    """Cleans up next to `folder` after processes that died while `replacing`; those still running are not touched."""
    for path in _beside(folder, ".lock"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except OSError:  # its process is alive, or of another user
            continue
        try:
            _clear(folder, path)
            path.unlink(missing_ok=True)
        finally:
            lock.release()


def _clear(folder: Path, lock: Path) -> None:
    """Removes what the process of `lock` has put next to `folder`, and restores the old folder where there is none."""
    _discard(lock.with_suffix(".tmp"), lock)
    former = lock.with_suffix(".old")
    deadline = time.monotonic() + PATIENCE
    while former.exists() and time.monotonic() < deadline:  # other processes may replace the folder meanwhile
        if folder.exists():
            _discard(former, lock)
        else:
            with suppress(OSError):
                former.rename(folder)


def _discard(former: Path, lock: Path) -> None:
    """Renames a folder before removing it, so that a half-removed one is never restored."""
    gone = lock.with_suffix(".gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # it is not there, or the disk refuses
        former.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Iterator[Path]:
    return folder.parent.glob(f".{escape(folder.name)}.*{suffix}")
