"""Shows runs in the terminal while they are trained."""

import time
from typing import Any

import psutil
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from core.events import (
    Ended,
    EpochDone,
    Event,
    FirstStep,
    ModeChanged,
    Notice,
    OnCluster,
    Resumed,
    Started,
    StepDone,
    Stopped,
)
from core.report import stats
from core.runs.record import Failed, Finished, Record
from core.runs.run import Run
from core.tally import Tally
from core.terminal import console, duration, say, warn

SILENCE = 30  # seconds; off a terminal, where there is no bar, a line then says how far a run is


class Display:
    """A listener. It shows a bar, and a line for each epoch; if there are several runs, a line for each run. Off a
    terminal there is no bar, but about every half minute a step is followed by a line.

    Use it in a `with` statement, which removes the bar at the end.
    """

    def __init__(self, tally: Tally, verbose: bool, on_cluster: bool = False, first: bool = True) -> None:
        """
        Args:
            tally: counts the runs that end.
            verbose: show the epochs even if there are several runs.
            on_cluster: other processes train, and the bar counts the runs.
            first: this process has trained nothing yet.
        """
        self.tally, self.verbose, self.on_cluster = tally, verbose, on_cluster
        self.since, self.what = (process_start(), "the process") if first else (time.perf_counter(), "this experiment")
        self.noticed: set[str] = set()
        self.ended: set[Run] = set()  # a run ends twice if the rest of its cohort is too large and is tried again
        self.training: list[Run] = []  # the current cohort, without the runs that have ended
        self.bars: Progress | None = None
        self.said = 0.0  # when the last line was printed

    @property
    def epochs(self) -> bool:
        """Whether to show each epoch."""
        return self.verbose or not self.tally.several

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bars:
            self.bars.stop()
            self.bars = None

    def __call__(self, run: Run, event: Event) -> None:
        match event:
            case Started():
                self._start(run, event.cohort)
            case Resumed():
                self._update(completed=event.step)
                inexact = f", not exact: {event.inexact}" if event.inexact else ""
                self._say(f"{run.label}: resumed after step {event.step} (epoch {event.epoch}){inexact}")
            case FirstStep():
                self._first_step(run, event)
            case StepDone():
                self._update(completed=event.step)
                if self._is_silent():
                    self._say_step(event.step)
            case OnCluster():
                if self._is_silent():
                    runs = "1 run" if event.runs == 1 else f"{event.runs:,} runs"
                    self._say(f"the cluster has {runs} ({progress(self.tally)})")
            case EpochDone():
                self._epoch(run, event)
            case Notice() | ModeChanged():
                self.notice(run, event.reason)
            case Stopped():
                self._end(run)
            case Ended():
                seconds = self._end(run)
                if run not in self.ended:
                    self.ended.add(run)
                    self._say_result(run, event.record, seconds)

    def notice(self, run: Run, reason: str) -> None:
        if reason not in self.noticed:
            self.noticed.add(reason)
            warn(f"{run.label}: {reason}")

    def _say(self, text: str) -> None:
        self.said = time.perf_counter()
        say(text)

    def _is_silent(self) -> bool:
        """Whether, off a terminal, nothing was said for a while."""
        return not console.is_interactive and time.perf_counter() - self.said >= SILENCE

    def _say_step(self, step: int) -> None:
        """Say how far the run is."""
        first, then, total = self.first
        left = duration((time.perf_counter() - then) / max(1, step - first) * (total - step))
        self._say(f"{self.description}: step {step:,} of {total:,}{self.note}, about {left} left")

    def _show(self, description: str, *more: ProgressColumn, **task: Any) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *more
        self.bars = Progress(
            *columns,
            console=console,
            refresh_per_second=2,  # more would slow the training down
            transient=True,
            disable=not console.is_interactive,
            redirect_stdout=False,  # the bar may be on stderr, and JSON on stdout
        )
        self.task = self.bars.add_task(description, **task)
        self.bars.start()

    def _update(self, **changes: Any) -> None:
        if self.bars:
            self.bars.update(self.task, **changes)

    def _start(self, run: Run, cohort: int) -> None:
        if self.on_cluster:
            if not self.bars:  # the data is loaded: its own bar is gone
                self.said = self.since = time.perf_counter()
                self._show("runs", total=self.tally.total, completed=self.tally.done)
            return
        if run in self.training:  # its cohort was too large, so it starts again alone
            self.training.clear()
            self.__exit__()
        self.training.append(run)
        if len(self.training) > 1:
            return
        self.said = self.started = time.perf_counter()
        self.cohort = cohort
        self.description = run.label if cohort == 1 else f"{run.label} and {cohort - 1} more"
        columns = TimeRemainingColumn(), TextColumn("{task.fields[note]}")
        self._show(self.description, *columns, total=None, note="compiling")
        self.note = ""
        if not console.is_interactive and (self.epochs or self.what == "the process"):
            self._say(f"{self.description}: starts; a step that is new here has to be compiled")

    def _first_step(self, run: Run, event: FirstStep) -> None:
        self._update(total=event.total, completed=event.step, note="")
        self.first = event.step, time.perf_counter(), event.total
        if run is self.training[0] and (self.epochs or self.what == "the process"):
            seconds = time.perf_counter() - self.since
            self._say(f"{self.description}: first step {seconds:.1f} s after the start of {self.what}")

    def _epoch(self, run: Run, event: EpochDone) -> None:
        if event.val_accuracy is None:
            note = f"train {stats.percent(event.train_accuracy)}"
        else:
            note = f"validation {stats.percent(event.val_accuracy)}"
        self._update(note=note)
        self.note = f", {note}"
        if self.epochs:
            self._say(
                f"{run.label}: epoch {event.epoch}: train loss {event.train_loss:.4f}, {note}, "
                f"{event.samples_per_second:,} samples/s"
            )

    def _end(self, run: Run) -> float:
        """Remove a run from the display. Returns the seconds that it took; 0 if another process trained it."""
        now = time.perf_counter()
        if self.on_cluster and self.bars:
            seconds, self.since = now - self.since, now
            self.bars.advance(self.task)
            return seconds
        if run not in self.training:
            return 0.0
        seconds = (now - self.started) / self.cohort
        self.training.remove(run)
        if not self.training:
            self.__exit__()
            self.since, self.what = now, "this experiment"
        return seconds

    def _say_result(self, run: Run, record: Record, seconds: float) -> None:
        if seconds and not self.on_cluster and isinstance(record, Finished):
            counted = max(seconds, stats.seconds(record))  # of a resumed run, `seconds` is only the last part
        else:
            counted = seconds
        self.tally.add(record, counted, run.title)
        if isinstance(record, Failed):
            warn(f"{run.label} failed: {record.error}")
        elif isinstance(record, Finished) and self.tally.several:
            validation, test = record.metrics.validation, stats.percent(record.metrics.test.accuracy)
            accuracy = f"validation {stats.percent(validation.accuracy)}, test {test}" if validation else f"test {test}"
            if self.on_cluster:
                how = "on the cluster"
            else:
                how = f"in {duration(seconds)}" if seconds else "by another process"
            self._say(f"{run.label}: {accuracy} {how} ({progress(self.tally)})")


class Bars(Display):
    """Shows the trials of a search: a bar, but no line for a run that ends."""

    def __init__(self, verbose: bool, total: int, on_cluster: bool) -> None:
        """`total`: the number of trials. Whoever searches counts those that are done: `tally.done`."""
        super().__init__(Tally([]), verbose, on_cluster)
        self.tally.total, self.tally.several = total, True

    def _say_result(self, run: Run, record: Record, seconds: float) -> None:
        pass


def process_start() -> float:
    """When this process started, on the clock of time.perf_counter."""
    return time.perf_counter() - (time.time() - psutil.Process().create_time())


def progress(tally: Tally) -> str:
    """'7 of 20 done, about 9 min left; best so far lr-1e-3, mean validation of 3 seeds 58.54%'."""
    text = f"{tally.done:,} of {tally.total:,} done"
    left = tally.seconds_left()
    if left and tally.done < tally.total:
        text += f", about {duration(left)} left"
    if not tally.results:
        return text
    best = tally.ranked()[0]
    accuracy, seeds = tally.validation(best), len(tally.results[best])
    if accuracy is not None:
        mean = f"mean validation of {seeds} seeds" if seeds > 1 else "validation"
        text += f"; best so far {best}, {mean} {stats.percent(accuracy)}"
    return text
