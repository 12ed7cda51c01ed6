"""Files and folders that are there whole or not at all, whenever the process or the machine dies."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


def sync(path: Path) -> None:
    """Forces a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes `path` whole or not at all: a temporary sibling, fsync, rename."""
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
    """Gives an empty folder to fill, which takes the place of `folder` when the block ends well.

    Two renames do it: `folder` is set aside, and the new one takes its name. A process killed in between
    leaves the old folder to `recover`. Files put into the new folder are for the caller to `sync`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    lock = folder.with_name(f".{folder.name}.{uuid4().hex}.lock")
    fresh, former = lock.with_suffix(".tmp"), lock.with_suffix(".old")
    with FileLock(lock):
        try:
            fresh.mkdir()
            yield fresh
            for inner in (*filter(Path.is_dir, fresh.rglob("*")), fresh):
                sync(inner)
            if folder.exists():
                folder.rename(former)
            fresh.rename(folder)
            sync(folder.parent)
        finally:
            _clear(folder, fresh, former)
            lock.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Puts right what processes that died while `replacing` have left beside `folder`.

    The former folder takes its place again if none has, and all else goes. What a living process writes
    stays.
    """
    for path in folder.parent.glob(f".{escape(folder.name)}.*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            _clear(folder, path.with_suffix(".tmp"), path.with_suffix(".old"))
            path.unlink(missing_ok=True)
        finally:
            lock.release()


def _clear(folder: Path, fresh: Path, former: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    if former.exists() and not folder.exists():
        former.rename(folder)
    elif former.exists():
        former.rename(fresh)  # so that what is half deleted never looks like a folder to restore
        shutil.rmtree(fresh, ignore_errors=True)
