"""Work in a thread of its own, while its caller waits.

A signal can raise an exception anywhere in the main thread. Inside an import, or inside torch, it may be swallowed, or
leave things half done. Here it arrives in the wait: it ends the wait at once, and the work never sees it.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

USUAL_INTERVAL = sys.getswitchinterval()
STOPPED = 130  # the exit status of a process that was interrupted


class Abandoned(BaseException):
    """Nobody waits for this work any more."""


class _Thread(threading.Thread):
    def __init__(self, work: Callable[[], object], on_stop: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work, self.on_stop, self.abandoned = work, on_stop, False
        self.outcome: Future = Future()

    def run(self) -> None:
        try:
            self.outcome.set_result(self.work())
        except BaseException as error:
            self.outcome.set_exception(error)
        finally:
            if self.abandoned:
                sys.setswitchinterval(USUAL_INTERVAL)


def wait_for(work: Callable[[], T], on_stop: Callable[[], None] = lambda: None) -> T:
    """Return what `work` returns, or raise what it raises.

    Args:
        work: runs in a thread of its own.
        on_stop: called when an exception, such as KeyboardInterrupt, ends the wait. The work goes on in the background
            until it next asks a `checker`, or until the process ends; then it is called again.
    """
    thread = _Thread(work, on_stop)
    try:
        _start(thread)
        return thread.outcome.result()
    except BaseException:
        if not thread.outcome.done():
            thread.abandoned = True
            sys.setswitchinterval(1e-4)  # At each system call of this thread, the other takes over for so long.
            on_stop()
        raise


def start(work: Callable[[], T]) -> Future[T]:
    """Start some work in a thread of its own, which the end of the process does not wait for."""
    thread = _Thread(work, lambda: None)
    _start(thread)
    return thread.outcome


def _start(thread: threading.Thread) -> None:
    """Start a thread with a large stack: on macOS it would have half a megabyte, too little for a compiler."""
    before = threading.stack_size(1 << 26)
    try:
        thread.start()
    finally:
        threading.stack_size(before)


def checker() -> Callable[[], None]:
    """A function that raises Abandoned once nobody waits for the work of this thread. Any thread may call it."""
    thread = threading.current_thread()

    def check() -> None:
        if getattr(thread, "abandoned", False):
            raise Abandoned

    return check


@atexit.register
def _leave() -> None:
    """End the process where abandoned work still goes on: Python would end its thread in the middle of C++ code, and
    that aborts the process."""
    at_work = [thread for thread in threading.enumerate() if isinstance(thread, _Thread) and thread.abandoned]
    for thread in at_work:
        thread.on_stop()
    if at_work:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STOPPED)
