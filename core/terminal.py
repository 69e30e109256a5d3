"""All that a terminal needs: lines of plain text, progress, tables, signals."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from core.data.cifar10 import CLASSES
from core.report import stats
from core.runs.record import Finished, Record

SAME_STOP = 1.0  # seconds within which a second signal is the same stop: `uv run` and a supervisor may both send it
NARROW = 60  # columns

console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def open_standard_streams() -> None:
    """Give a process that was started with closed standard streams empty ones, and have every stream show what its
    encoding lacks as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: without this, the next file would take it
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """The text with control characters and the like as escapes: it may come from a file or from a name."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print a line on stdout; a terminal wraps it, nothing else does."""
    console.print(printable(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a line on stderr."""
    errors.print(printable(text), soft_wrap=True)


class Stop:
    """SIGINT, SIGTERM and SIGHUP: the first asks the run to save and stop, a later one stops at once."""

    def __init__(self) -> None:
        self.requested: float | None = None
        self.stepping = False  # before the first step there is nothing to save

    def __call__(self) -> bool:
        return self.requested is not None

    def _handle(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.requested is not None:
            if now - self.requested < SAME_STOP:
                return
            if console.is_terminal:
                os.write(1, b"\x1b[?25h\n")  # the progress bar hid the cursor
            os._exit(128 + signum)
        self.requested = now
        if not self.stepping:
            raise KeyboardInterrupt

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                signal.signal(signum, self._handle)


class Display:
    """Shows experiments as they are trained: a bar, and a line for each epoch."""

    def __init__(self, stop: Stop, started: float) -> None:
        """`started`: time.perf_counter() at the start of the process."""
        self.stop, self.since, self.what = stop, started, "the process"
        self.noticed: set[str] = set()

    @contextlib.contextmanager
    def experiment(self, name: str) -> Iterator[Callable[[Any], None]]:
        """What run_experiment is to call with its events."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        # Two refreshes a second: more would take time from the two cores that train.
        with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bars:
            task = bars.add_task(name, total=None, note="compiling")

            def on_event(event: Any) -> None:
                kind, details = event
                if kind == "step":
                    bars.update(task, completed=details["step"])
                elif kind == "first_step":
                    self.stop.stepping = True
                    bars.update(task, total=details["total"], completed=details["step"], note="")
                    say(f"{name}: first step {time.perf_counter() - self.since:.1f} s after the start of {self.what}")
                elif kind == "resumed":
                    bars.update(task, completed=details["step"])
                    bits = f", not bitwise: {details['different']}" if details["different"] else ""
                    say(f"{name}: resumed after step {details['step']} (epoch {details['epoch']}){bits}")
                elif kind == "epoch":
                    note = f"validation {stats.percent(details['val_accuracy'])}"
                    bars.update(task, note=note)
                    say(
                        f"{name}: epoch {details['epoch']}: train loss {details['train_loss']:.4f}, {note}, "
                        f"{details['samples_per_second']:,} samples/s"
                    )
                elif "reason" in details and details["reason"] not in self.noticed:  # notice, eager
                    self.noticed.add(details["reason"])
                    warn(f"{name}: {details['reason']}")

            try:
                yield on_event
            finally:
                self.stop.stepping = False
                self.since, self.what = time.perf_counter(), "this experiment"


@contextlib.contextmanager
def fetching() -> Iterator[Callable[[str, int, int], None]]:
    """What core.data.cifar10.load is to call while it fetches: a bar for each source."""
    tasks: dict[str, Any] = {}
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bars:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what), total=total)
            bars.update(tasks[what], completed=done)

        yield show


def table(records: Iterable[Record]) -> None:
    """Print the results of finished runs."""
    columns = ["experiment", "lr", "epochs", "train", "validation", "test", "95%", "samples/s"]
    shown = [0, 4, 5] if console.width < NARROW else range(len(columns))
    grid = Table(*(columns[i] for i in shown), box=None, pad_edge=False)
    for record in records:
        if isinstance(record, Finished):
            metrics = record.metrics
            low, high = stats.interval(metrics.test.accuracy, metrics.test.n)
            row = [
                record.name,
                f"{record.spec['lr']:g}",
                str(record.spec["epochs"]),
                *(stats.percent(split.accuracy) for split in (metrics.train, metrics.validation, metrics.test)),
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{stats.speed(record):,}",
            ]
            grid.add_row(*(row[i] for i in shown))
    if grid.row_count:
        console.print(grid)


def evaluation(path: Path, about: Any, evaluated: Any) -> None:
    """Print what a checkpoint reaches: core.runs.record.Weights, and a core.predict.Evaluation."""
    found, recorded = evaluated.found, evaluated.recorded
    low, high = stats.interval(found["accuracy"], found["n"])
    verdict = (
        "as recorded"
        if evaluated.same
        else (
            f"the run recorded {stats.percent(recorded.accuracy)}, {recorded.loss:.4f}, weights {evaluated.digest[:12]}"
        )
    )
    say(
        f"{about.name} ({path}): {stats.percent(found['accuracy'])} of {found['n']:,} test images "
        f"(95% interval {100 * low:.2f}-{100 * high:.2f}%), loss {found['loss']:.4f}; {verdict}"
    )
    classes = zip(CLASSES, found["correct"], found["count"], strict=True)
    say("  " + ", ".join(f"{label} {100 * hit / count:.1f}%" for label, hit, count in classes))


def evaluation_as_json(path: Path, about: Any, evaluated: Any) -> None:
    """Print the same as one line of JSON."""
    line = {
        "checkpoint": str(path),
        "experiment": about.name,
        "seed": about.seed,
        "test_accuracy": evaluated.found["accuracy"],
        "test_loss": evaluated.found["loss"],
        "n": evaluated.found["n"],
        "recorded_test_accuracy": evaluated.recorded.accuracy,
    }
    print(json.dumps(line))
