"""Ctrl-C ends the process with status 130 and no traceback, within about a second, whatever it is doing.

KeyboardInterrupt is raised in the main thread and in all others: each ends its child processes and removes its
temporary files. Callbacks of the garbage collector and destructors swallow exceptions; `sys.unraisablehook` sees
those, and KeyboardInterrupt is raised again. A thread that is longer in a library's C++ code, as XLA is when it
compiles, ends with the process.
"""

import ctypes
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

GRACE_SECONDS = 1.0
AGAIN_SECONDS = 0.03
STATUS = 128 + signal.SIGINT
SHOW_CURSOR = b"\x1b[?25h\n"  # progress bars hide the cursor

received = threading.Event()
"""Set once Ctrl-C was pressed."""
at_end: list[Callable[[], object]] = []
"""Functions called before the process ends, the last first, possibly in another thread than the work."""
_due = threading.Event()  # the handler should raise KeyboardInterrupt
_instead: Callable[[], object] | None = None  # what Ctrl-C does, where it does not end the process
_leaving = threading.Event()  # the process ends: nothing raises it any more
_swallowed: queue.SimpleQueue[int] = queue.SimpleQueue()  # the threads whose KeyboardInterrupt was lost


def install() -> None:
    """Installs the SIGINT handler, unless the process was started with SIGINT ignored, as background jobs are."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    sys.unraisablehook, sys.excepthook = _unraisable, _uncaught
    _due.set()
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


def leave(status: int) -> NoReturn:
    """Ends the process, with status 130 where Ctrl-C was pressed. The caller has flushed the standard streams.

    The interpreter is not finalized: with JAX that takes long, and it waits for threads.
    """
    _leaving.set()
    for call in reversed(at_end):
        with suppress(Exception):
            call()
    if received.is_set():
        with suppress(OSError):
            if os.isatty(2):
                os.write(2, SHOW_CURSOR)
        status = STATUS
    os._exit(status)


def replace(call: Callable[[], object]) -> None:
    """Has Ctrl-C call `call` in the main thread from now on, and not end the process."""
    global _instead  # noqa: PLW0603
    _instead = call


def _interrupt(signum: int, frame: FrameType | None) -> None:
    if _instead is not None:
        _instead()
        return
    received.set()
    # a second Ctrl-C does not interrupt the cleanup of the first
    if _due.is_set() and not _leaving.is_set() and not _importing(frame):
        _due.clear()
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: jaxlib's C++ crashes on an exception during its import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _watch(reading: int) -> None:
    """Waits for the signal in a thread, since the main thread may be in C code."""
    while signal.SIGINT not in os.read(reading, 64) or _instead is not None:
        pass
    deadline = time.monotonic() + GRACE_SECONDS
    received.set()
    threading.excepthook = lambda _: None
    logging.disable()
    for thread in threading.enumerate():
        if thread not in (threading.main_thread(), threading.current_thread()) and thread.ident is not None:
            _raise_in(thread.ident)
    while time.monotonic() < deadline:
        try:
            _raise_in(_swallowed.get(timeout=AGAIN_SECONDS))
        except queue.Empty:
            if _due.is_set():  # it was importing, or another thread got the signal and it waits for something
                _raise_in_main()
    leave(STATUS)


def _raise_in(thread: int) -> None:
    if thread == threading.main_thread().ident:
        _due.set()
        _raise_in_main()
    elif not _importing(sys._current_frames().get(thread)):
        raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
        raise_in_thread(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


def _raise_in_main() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _unraisable(lost: Any) -> None:
    if not received.is_set():
        sys.__unraisablehook__(lost)
    elif lost.exc_type is KeyboardInterrupt:
        _swallowed.put(threading.get_ident())


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not received.is_set():
        sys.__excepthook__(kind, error, traceback)
        leave(1)
    leave(STATUS)
