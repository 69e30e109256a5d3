"""The signals that stop a run: SIGINT, SIGTERM, SIGHUP, and SIGBREAK of Windows. main.py sets them up once, first of
all, so this module imports nothing that takes time."""

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
STOPS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
SAME_STOP = 1.0  # seconds within which a second signal is the same stop: `uv run` and a supervisor may both send it


class Stop:
    """Whether a signal has asked to stop: what the training polls, as `should_stop`.

    The first signal ends the process at once while modules are imported, since an exception could leave half a module
    behind. It raises KeyboardInterrupt while there is nothing to save. During the steps it only asks. A later signal
    ends the process.

    Attributes:
        importing: whether modules are imported now.
        stepping: whether there are steps to save.
    """

    def __init__(self) -> None:
        self.requested: float | None = None
        self.importing, self.stepping = True, False

    def install(self) -> None:
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self.requested is not None

    def listen(self, run: Any, event: Any) -> None:
        """A listener: between the first step of runs and their end, there are steps to save."""
        self.stepping = type(event).__name__ not in ("Started", "Ended")

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.importing:
            end_process(number)
        if self.requested is not None:
            if now - self.requested < SAME_STOP:
                return
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the progress bar hid the cursor
            os._exit(128 + number)
        self.requested = now
        if not self.stepping:
            raise KeyboardInterrupt

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
    """End the process as the signal would, after what was printed is out."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)
