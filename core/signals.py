"""Handles the signals that stop a run: SIGINT, SIGTERM, SIGHUP, and SIGBREAK of Windows. main.py does this before
anything else, so this module imports nothing that takes time."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
STOPS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
SAME_STOP = 1.0  # seconds within which a second signal is the same stop: `uv run` and a supervisor may both send it


class Stop:
    """Whether a signal has asked to stop. The training polls it as `should_stop`.

    While modules are imported, the first signal ends the process, since an exception could leave a module half
    imported. While there is nothing to save, it raises KeyboardInterrupt. During the steps, it only sets `requested`.
    A later signal ends the process, or, in `during_call`, raises KeyboardInterrupt.

    Attributes:
        requested: when the first signal came.
        importing: whether modules are imported now.
        running: the number of runs that are trained together and have not ended.
        stepping: whether there are steps to save.
        in_call: whether the process belongs to the caller: a script or the kernel of a notebook.
    """

    def __init__(self) -> None:
        self.requested: float | None = None
        self.importing, self.stepping, self.running = True, False, 0
        self.in_call = False

    def install(self) -> None:
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self.requested is not None

    def listen(self, run: Any, event: Any) -> None:
        """A listener. Put it last: after it, a signal may raise, and a later listener would miss the event.

        There are steps to save from the first step of a cohort, which follows its compilation, to the end of its last
        run.
        """
        from core.events import Ended, FirstStep, Started, Stopped  # not at the top: it takes time

        match event:
            case Started():
                self.running, self.stepping = event.cohort, False
            case FirstStep():
                self.stepping = True
            case Stopped() | Ended():
                self.running -= 1
                self.stepping = self.stepping and self.running > 0

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.importing:
            end_process(number)
        if self.requested is not None:
            if now - self.requested < SAME_STOP:
                return
            if self.in_call:
                raise KeyboardInterrupt
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the progress bar hid the cursor
            os._exit(128 + number)
        self.requested = now
        if not self.stepping:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def during_call(self) -> Iterator[None]:
        """Handle SIGINT for the length of a call: Ctrl-C, or the stop button of a notebook.

        Only the main thread can, and a handler that the caller has set stays.
        """
        default, main = signal.default_int_handler, threading.main_thread()
        if signal.getsignal(signal.SIGINT) != default or threading.current_thread() != main:
            yield
            return
        self.importing, self.in_call = False, True
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, default)

    @contextlib.contextmanager
    def quick_imports(self) -> Iterator[None]:
        """Import torch without garbage collection, which would take 0.3 s. A signal ends the process."""
        before, self.importing = self.importing, True
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            self.importing = before


def end_process(number: int) -> None:
    """Flush stdout, then end the process as the signal would."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)
