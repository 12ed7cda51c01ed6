"""Runs neuronx-cc, AWS's compiler, which compiles HLO modules to NEFFs.

https://awsdocs-neuron.readthedocs-hosted.com/en/latest/compiler/neuronx-cc/api-reference-guide/
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from jx_neuron.compiler import cache as compile_cache
from jx_neuron.compiler.errors import explain
from jx_neuron.compiler.options import DUMP_VARIABLE, CompilerOptions, flags, key_flags, target
from jx_neuron.errors import CompilerError
from jx_neuron.util import progress as progress_bars
from jx_neuron.util.durable import write_file
from jx_neuron.util.temporary import temporary_folder

REPOSITORY = "--extra-index-url https://pip.repos.neuron.amazonaws.com"
INSTALL = f"pip install neuronx-cc torch-neuronx {REPOSITORY}"

WORKERS_VARIABLE = "NEURON_COMPILATION_WORKER_COUNT"

HLO_FILE, NEFF_FILE = "model.hlo.pb", "model.neff"
LOG_FILE, OUTPUT_FILE, COMMAND_FILE = "log-neuron-cc.txt", "output.txt", "command.txt"
TAIL_LINES = 20
GRACE_SECONDS = 0.5
_running: set["subprocess.Popen[bytes]"] = set()


@dataclass(frozen=True)
class Compiler:
    """An installed neuronx-cc: its executable, and the version that it prints."""

    path: Path
    version: str


def find_compiler() -> Compiler:
    """The neuronx-cc on PATH, or next to this Python's executable.

    Raises CompilerError, which says what to install, where there is none.
    """
    executable = shutil.which("neuronx-cc") or shutil.which("neuronx-cc", path=str(Path(sys.executable).parent))
    if executable is None:
        raise CompilerError(
            "neuronx-cc, AWS's compiler, is not installed. It runs on Linux x86-64, and comes from AWS's "
            f"Neuron repository: {INSTALL}. All but the NEFFs works without it: compile with --hlo-only"
        )
    process = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"Compiler version\s+(\S+)", process.stdout + process.stderr)
    if process.returncode or version is None:
        message = (process.stderr or process.stdout).strip() or "nothing"
        raise CompilerError(
            f"{executable} --version does not name a version; it said: {message}. Reinstall it: {INSTALL}"
        )
    return Compiler(Path(executable), version[1])


def command(compiler: Compiler, hlo: Path, neff: Path, options: CompilerOptions) -> list[str]:
    """The command that compiles the HloModuleProto file `hlo` to `neff`, with the log next to it."""
    return [
        str(compiler.path),
        "compile",
        str(hlo),
        *flags(options),
        f"--output={neff}",
        f"--logfile={neff.with_name(LOG_FILE)}",
    ]


def worker_count(options: CompilerOptions, jobs: int | None = None) -> int:
    """The number of programs compiled at a time."""
    count = jobs if jobs is not None else options.compilation_worker_count
    if count is None and (text := os.environ.get(WORKERS_VARIABLE)):
        if not text.isdecimal():
            raise CompilerError(f"{WORKERS_VARIABLE}={text} is not a number of workers")
        count = int(text)
    if count is None:
        return max(1, (os.cpu_count() or 1) // 4)
    if count < 1:
        raise CompilerError(f"{count} programs at a time cannot be compiled: at least 1 worker is needed")
    return count


def compile_programs(
    programs: Mapping[str, bytes],
    options: CompilerOptions | None = None,
    *,
    jobs: int | None = None,
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> dict[str, bytes]:
    """Compiles serialized HloModuleProtos, by name, to NEFFs, several at a time.

    NEFFs that any process compiled before come from the cache (`cache_dir`, by default
    `compile_cache.default_folder()`). Where `NEURONX_DUMP_TO` names a folder, each program's HLO, NEFF, logs and
    command are kept in a subfolder.

    Raises CompilerError where the compiler is missing or refuses a program. The other compilations are then stopped,
    as on Ctrl-C, and finished NEFFs stay in the cache.
    """
    options = options or CompilerOptions()
    workers = worker_count(options, jobs)
    run = _Run(
        find_compiler(),
        options,
        Path(cache_dir).expanduser() if cache_dir is not None else compile_cache.default_folder(),
        threading.Event(),
    )
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="neuronx-cc") as pool,
        progress_bars.bar() if progress else nullcontext() as bar,
    ):
        futures: dict[Future[bytes], str] = {}
        try:
            futures = {pool.submit(run.neff, name, hlo): name for name, hlo in programs.items()}
            task = bar.add_task("Compiling with neuronx-cc", total=len(futures)) if bar else None
            for future in as_completed(futures):
                future.result()
                if bar and task is not None:
                    bar.update(task, advance=1, description=f"Compiled {futures[future]}")
        except BaseException:
            run.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    neffs = {name: future.result() for future, name in futures.items()}
    return {name: neffs[name] for name in programs}


@dataclass(frozen=True)
class _Run:
    """The state that the compilations of one call share."""

    compiler: Compiler
    options: CompilerOptions
    cache: Path
    stop: threading.Event

    def neff(self, name: str, hlo: bytes) -> bytes:
        key = compile_cache.key(hlo, key_flags(flags(self.options)), self.compiler.version)
        with _workspace(f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{key[:8]}") as folder:
            if (neff := compile_cache.load(self.cache, key)) is None:
                with compile_cache.lock(self.cache, key, self.stop.is_set):
                    if (neff := compile_cache.load(self.cache, key)) is None:
                        neff = self.compile(name, hlo, folder)
                        compile_cache.store(self.cache, key, neff)
            if os.environ.get(DUMP_VARIABLE) and not (folder / NEFF_FILE).exists():
                self.lay_out(hlo, folder)
                (folder / NEFF_FILE).write_bytes(neff)
            return neff

    def lay_out(self, hlo: bytes, folder: Path) -> list[str]:
        line = command(self.compiler, folder / HLO_FILE, folder / NEFF_FILE, self.options)
        (folder / HLO_FILE).write_bytes(hlo)
        (folder / COMMAND_FILE).write_text(shlex.join(line) + "\n")
        return line

    def compile(self, name: str, hlo: bytes, folder: Path) -> bytes:
        line = self.lay_out(hlo, folder)
        output = folder / NEFF_FILE
        output.unlink(missing_ok=True)
        with open(folder / OUTPUT_FILE, "wb") as log:
            process = subprocess.Popen(
                line,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with _killed_on_exit(process):
                while process.poll() is None:
                    if self.stop.wait(0.05):
                        raise compile_cache.CancelledError
        if process.returncode == 0 and output.exists() and output.stat().st_size:
            return output.read_bytes()
        raise CompilerError(self.failure(name, process.returncode, folder))

    def failure(self, name: str, status: int, folder: Path) -> str:
        log = "".join(
            path.read_text(errors="replace") for path in (folder / LOG_FILE, folder / OUTPUT_FILE) if path.exists()
        )
        log_path = folder / OUTPUT_FILE
        if not os.environ.get(DUMP_VARIABLE):
            log_path = self.cache / "failed" / f"{folder.name}.log"
            log_path.parent.mkdir(parents=True, exist_ok=True)
            write_file(log_path, log.encode())
        tail = [line for line in log.splitlines() if line.strip()][-TAIL_LINES:]
        return "\n".join(
            [
                f"neuronx-cc {self.compiler.version} could not compile the program {name!r} "
                f"for {target(self.options)}: {explain(log, status)}",
                f"The end of its log ({log_path}):",
                *(f"  {line}" for line in tail or ["(it wrote nothing)"]),
            ]
        )


@contextmanager
def _workspace(name: str) -> Iterator[Path]:
    if dump := os.environ.get(DUMP_VARIABLE):
        folder = Path(dump).expanduser().resolve() / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompilerError(f"{DUMP_VARIABLE}={dump} cannot be written: {error.strerror}") from error
        yield folder
    else:
        with temporary_folder() as parent:
            folder = parent.resolve() / name
            folder.mkdir()
            yield folder


@contextmanager
def _killed_on_exit(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kills `process` and its descendants, however the block is left."""
    _running.add(process)
    try:
        yield
    finally:
        with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _running.discard(process)


def abandon() -> None:
    """Kills the running compilers and their descendants; for the thread that ends this process."""
    for process in list(_running):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
