"""Temporary folders, removed even where the process exits without cleaning up."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_folders: set[Path] = set()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a new temporary folder, removed when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="jx-neuron-"))
    _folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.discard(folder)


def abandon() -> None:
    """Removes every temporary folder; for the thread that ends this process."""
    for folder in list(_folders):
        shutil.rmtree(folder, ignore_errors=True)
