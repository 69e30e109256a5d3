"""All that a terminal needs: lines of plain text, progress, tables, signals."""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

from rich.console import Console
from rich.filesize import decimal
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
from core.errors import UserError
from core.estimate import Estimate
from core.plan import Run
from core.report import stats
from core.runs.record import Finished, Record
from core.spec import FIELDS, spec_id
from core.tally import Tally

SAME_STOP = 1.0  # seconds within which a second signal is the same stop: `uv run` and a supervisor may both send it
NARROW = 60  # columns
ROWS = 30  # of a table, at most
SHOWN = 3  # runs that a sentence names, at most

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
    log = logging.getLogger("core")
    log.handlers, log.propagate = [Warnings()], False


def printable(text: str) -> str:
    """The text as one line, with control characters and the like as escapes: it may come from a file or from a name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print a line on stdout; a terminal wraps it, nothing else does."""
    console.print(printable(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a line on stderr."""
    errors.print(printable(text), soft_wrap=True)


def fail(error: Exception) -> None:
    """Print what ended a command: a line, or a paragraph where a UserError has more."""
    first, *more = error.args if isinstance(error, UserError) and error.args else [error]
    for line in (f"error: {first}", *map(str, more)):
        warn(line)


class Warnings(logging.Handler):
    """Shows what the code below has to say to whoever calls it, each thing once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.said:
            self.said.add(text)
            warn(text)


def other_code(labels: Sequence[str]) -> None:
    """Say which finished runs are of other code, if any are."""
    if labels:
        more = f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else ""
        runs = "finished run is" if len(labels) == 1 else "finished runs are"
        warn(
            f"{len(labels):,} {runs} of other code, which gives other numbers ({', '.join(labels[:SHOWN])}{more}): "
            "neither counted as results of this code nor replaced; --force trains them anew"
        )


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
    """Shows runs as they are trained: a bar, and a line for each epoch; or, of several runs, a line for each run."""

    def __init__(self, runs: Sequence[Run], verbose: bool, started: float) -> None:
        """`verbose`: show the epochs of several runs, too. `started`: time.perf_counter() at the start of the
        process."""
        self.tally, self.stop = Tally(runs), Stop()
        self.several = self.tally.total > 1
        self.epochs = verbose or not self.several
        self.since, self.what = started, "the process"
        self.seconds = 0.0  # what each of the last runs took; 0 where they were finished already
        self.noticed: set[str] = set()
        self.elsewhere = False  # whether a cluster trains

    def found(self) -> None:
        """Say which runs were finished already."""
        tally = self.tally
        if tally.done and self.several:
            say(f"{tally.done:,} of {tally.total:,} runs are finished already; --force trains them again")
        elif tally.done:
            ((name, (result,)),) = tally.results.items()
            accuracy, again = stats.percent(result.test), "--force trains it again"
            say(f"{name} ({spec_id(tally.specs[name])}) is finished: {accuracy} test accuracy; {again}")

    @contextlib.contextmanager
    def run(self, labels: Sequence[str]) -> Iterator[list[Callable[[Any], None]]]:
        """For each run that is trained now, all together, what is to be called with its events."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        first, more = labels[0], f" and {len(labels) - 1} more" * (len(labels) > 1)
        begun, happened = time.perf_counter(), False
        # Two refreshes a second: more would take time from the two cores that train.
        shown = console.is_terminal
        with Progress(*columns, console=console, refresh_per_second=2, transient=True, disable=not shown) as bars:
            task = bars.add_task(first + more, total=None, note="compiling")

            def on_event(label: str, event: Any) -> None:
                nonlocal happened
                happened = True
                kind, details = event
                if kind == "step":
                    bars.update(task, completed=details["step"])
                elif kind == "first_step":
                    self.stop.stepping = True
                    bars.update(task, total=details["total"], completed=details["step"], note="")
                    if label == first and (self.epochs or self.what == "the process"):
                        seconds = time.perf_counter() - self.since
                        say(f"{label}{more}: first step {seconds:.1f} s after the start of {self.what}")
                elif kind == "resumed":
                    bars.update(task, completed=details["step"])
                    bits = f", not bitwise: {details['different']}" if details["different"] else ""
                    say(f"{label}: resumed after step {details['step']} (epoch {details['epoch']}){bits}")
                elif kind == "epoch":
                    accuracy = details["val_accuracy"]
                    note = f"train {stats.percent(details['train_accuracy'])}"
                    if accuracy is not None:
                        note = f"validation {stats.percent(accuracy)}"
                    bars.update(task, note=note)
                    if self.epochs:
                        say(
                            f"{label}: epoch {details['epoch']}: train loss {details['train_loss']:.4f}, {note}, "
                            f"{details['samples_per_second']:,} samples/s"
                        )
                elif kind in ("notice", "mode") and details["reason"] not in self.noticed:
                    self.noticed.add(details["reason"])
                    warn(f"{label}: {details['reason']}")

            try:
                yield [partial(on_event, label) for label in labels]
            finally:
                self.stop.stepping = False
                self.seconds = (time.perf_counter() - begun) / len(labels) if happened else 0.0
                self.since, self.what = time.perf_counter(), "this experiment"

    @contextlib.contextmanager
    def cluster(self) -> Iterator[Callable[[], None]]:
        """A bar over all runs, which others train; yields what is to be called when one of them has ended."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.elsewhere, since = True, time.perf_counter()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task("runs", total=self.tally.total, completed=self.tally.done)

            def ended() -> None:
                nonlocal since
                now = time.perf_counter()
                self.seconds, since = now - since, now
                bars.advance(task)

            yield ended

    def ended(self, record: Record) -> None:
        """Count a run that has ended, and say what it reached: one of several in a line."""
        tally, label, seconds = self.tally, self.tally.label(record.name, record.seed), self.seconds
        if seconds and not self.elsewhere and isinstance(record, Finished):
            seconds = max(seconds, stats.seconds(record))  # this call has seen only the end of a resumed run
        tally.add(record, seconds)
        if not isinstance(record, Finished):
            warn(f"{label} failed: {record.error}")
        elif self.several:
            validation, test = record.metrics.validation, record.metrics.test.accuracy
            on_validation = f"validation {stats.percent(validation.accuracy)}, " if validation else ""
            how = f"in {duration(self.seconds)}" if self.seconds else "by another process"
            how = "on the cluster" if self.elsewhere else how
            say(f"{label}: {on_validation}test {stats.percent(test)} {how} ({progress(tally)})")


def progress(tally: Tally) -> str:
    """'7 of 20 done, about 9 min left; best so far lr-1e-3, mean validation of 3 seeds 58.54%'."""
    left = tally.seconds_left()
    left_too = f", about {duration(left)} left" if left and tally.done < tally.total else ""
    best = tally.ranked()[0]
    seeds, accuracy = len(tally.results[best]), tally.validation(best)
    mean = f"mean validation of {seeds} seeds" if seeds > 1 else "validation"
    best_too = "" if accuracy is None else f"; best so far {best}, {mean} {stats.percent(accuracy)}"
    return f"{tally.done:,} of {tally.total:,} done{left_too}{best_too}"


def duration(seconds: float) -> str:
    """'41 s', '9 min', '2 h 5 min'."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def estimate(found: Estimate, while_trained: bool = False) -> str:
    """'about 82 s, 15.2 MB'; with `while_trained`, also what a run needs before it ends."""
    if found.seconds is None:
        seconds = "time not measured here yet"
    else:
        seconds = f"about {duration(found.seconds)}" if found.seconds >= 1 else "under a second"
    meanwhile = f", and {decimal(found.meanwhile)} while one is trained" if while_trained else ""
    return f"{seconds}, {decimal(found.kept)}{meanwhile}"


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


def keys() -> None:
    """Print every key of a spec with its default, its values and its meaning."""
    grid = Table("key", "default", "values", "meaning", box=None, pad_edge=False)
    for key, field in FIELDS.items():
        grid.add_row(key, stats.shown(field.default), str(field.values), field.meaning)
    console.print(grid)


def table(tally: Tally) -> None:
    """Print what the finished runs have reached: a row for each experiment, of very many the best."""
    names = list(tally.results) if len(tally.results) <= ROWS else tally.ranked()[:ROWS]
    if console.width < NARROW:
        columns = ["experiment", "validation", "test"]
    elif tally.seeds:
        columns = ["experiment", "seeds", "train", "validation", "test"]
    else:
        columns = ["experiment", "lr", "epochs", "train", "validation", "test", "95%", "samples/s"]
    grid = Table(*columns, box=None, pad_edge=False)
    for name in names:
        spec, results = tally.specs[name], tally.results[name]
        train, validation, test, images, speeds = zip(*results, strict=True)
        low, high = stats.interval(test[0], images[0])
        row = {
            "experiment": name,
            "lr": f"{spec['lr']:g}",
            "epochs": str(spec["epochs"]),
            "seeds": str(len(results)),
            "train": stats.spread(train),
            "validation": "none" if None in validation else stats.spread(validation),
            "test": stats.spread(test),
            "95%": f"{100 * low:.1f}-{100 * high:.1f}",
            "samples/s": f"{median_high(speeds):,}",
        }
        grid.add_row(*(row[column] for column in columns))
    if names:
        console.print(grid)
    if len(names) < len(tally.results):
        say(f"the best {ROWS} of {len(tally.results):,} experiments by validation accuracy")


def evaluation(path: Path, about: Any, evaluated: Any) -> None:
    """Print what a checkpoint reaches: core.runs.record.Weights, and a core.predict.Evaluation."""
    found, recorded = evaluated.found, evaluated.recorded
    low, high = stats.interval(found["accuracy"], found["n"])
    numbers = f"{stats.percent(recorded.accuracy)}, {recorded.loss:.4f}" if recorded else "no such evaluation"
    if evaluated.same:
        verdict = "as recorded" if recorded else "the run did not evaluate in this way"
        verdict = f"the run had other data: {evaluated.other_data}" if evaluated.other_data else verdict
    else:
        verdict = f"the run recorded {numbers}, weights {evaluated.digest[:12]}"
    mirrored = ", mirror images averaged in" * evaluated.flip
    say(
        f"{about.name} ({path}): {stats.percent(found['accuracy'])} of {found['n']:,} test images{mirrored} "
        f"(95% interval {100 * low:.2f}-{100 * high:.2f}%), loss {found['loss']:.4f}; {verdict}"
    )
    classes = zip(CLASSES, found["correct"], found["count"], strict=True)
    say("  " + ", ".join(f"{label} {100 * hit / count:.1f}%" for label, hit, count in classes))


def prediction(path: Path, likeliest: Sequence[tuple[int, float]]) -> None:
    """Print classes of an image with their probabilities, as core.predict.likeliest returns them."""
    say(f"{path}: " + ", ".join(f"{CLASSES[i]} {stats.percent(probability)}" for i, probability in likeliest))


def prediction_as_json(path: Path, likeliest: Sequence[tuple[int, float]]) -> None:
    """Print the same as one line of JSON."""
    classes = [{"class": CLASSES[i], "probability": probability} for i, probability in likeliest]
    print(json.dumps({"image": str(path), "classes": classes}))


def evaluation_as_json(path: Path, about: Any, evaluated: Any) -> None:
    """Print the same as one line of JSON."""
    line = {
        "checkpoint": str(path),
        "experiment": about.name,
        "seed": about.seed,
        "test_accuracy": evaluated.found["accuracy"],
        "test_loss": evaluated.found["loss"],
        "n": evaluated.found["n"],
        "tta": "flip" if evaluated.flip else "none",
        "recorded_test_accuracy": evaluated.recorded.accuracy if evaluated.recorded else None,
    }
    print(json.dumps(line))
