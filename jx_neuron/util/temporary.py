"""Temporary folders, removed also where the process ends at once."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_folders: set[Path] = set()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder of the system's temporary ones, removed when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="jx-neuron-"))
    _folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.discard(folder)


def abandon() -> None:
    """Removes those that there are; for the thread that ends this process."""
    for folder in list(_folders):
        shutil.rmtree(folder, ignore_errors=True)
