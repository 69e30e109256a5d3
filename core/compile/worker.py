"""Work in a thread, while its caller waits.

A signal can raise an exception anywhere in the main thread. An import or torch may swallow it, or stop halfway. If the
main thread only waits, the exception ends the wait at once, and the work never sees it.
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

_this = threading.local()  # its `work` is the work of this thread
_abandoned: dict[Future, Callable[[], None]] = {}  # work that nobody waits for any more, and how to stop it


class Abandoned(BaseException):
    """Nobody waits for this work any more."""


def start(call: Callable[[], T], work: Future[T] | None = None) -> Future[T]:
    """Start a call in a thread, which the end of the process does not wait for; `work` is the future to use."""
    future: Future[T] = work or Future()

    def run() -> None:
        _this.work = future
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        finally:
            if _abandoned.pop(future, None):
                sys.setswitchinterval(USUAL_INTERVAL)

    before = threading.stack_size(1 << 26)  # macOS would give half a megabyte, too little for a compiler
    try:
        threading.Thread(target=run, daemon=True).start()
    finally:
        threading.stack_size(before)
    return future


def wait_for(call: Callable[[], T], on_stop: Callable[[], None] = lambda: None) -> T:
    """Return what `call` returns, or raise what it raises.

    Args:
        on_stop: Called when an exception, such as KeyboardInterrupt, ends the wait, and when the process ends. Until
            then the work goes on, unless it asks a `checker`.
    """
    work: Future[T] = Future()
    try:
        return start(call, work).result()
    except BaseException:
        if not work.done():
            _abandoned[work] = on_stop
            sys.setswitchinterval(1e-4)  # Otherwise each system call of `on_stop` gives the other thread 5 ms.
            on_stop()
        raise


def checker() -> Callable[[], None]:
    """A function, for any thread, that raises Abandoned once nobody waits for the work of this thread."""
    work = getattr(_this, "work", None)

    def check() -> None:
        if work in _abandoned:
            raise Abandoned

    return check


@atexit.register
def _end_process() -> None:
    """End the process at once if abandoned work goes on. Python would end its thread in the middle of C++ code, which
    aborts the process."""
    unfinished = [on_stop for work, on_stop in list(_abandoned.items()) if not work.done()]
    for on_stop in unfinished:
        on_stop()
    if unfinished:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STOPPED)
