"""Counts the runs of a call: how many are done, how long the rest takes, which experiment is best."""

from collections.abc import Iterable
from statistics import fmean, median
from typing import NamedTuple

from core.estimate import work
from core.report import stats
from core.runs.record import Finished, Record
from core.runs.run import Run
from core.spec import Spec


class Result(NamedTuple):
    """The numbers of a finished run: accuracies, test images, samples per second."""

    train: float
    validation: float | None  # None if all images were trained on
    test: float
    images: int
    speed: int


class Tally:
    """Progress and results of the runs of a call.

    Attributes:
        specs: by the title of the experiment.
        total, done: the number of runs, and the number of those that have ended.
        several, seeds: whether the call has several runs, and whether an experiment has several seeds.
        results: of the finished runs, by the title of the experiment.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.specs: dict[str, Spec] = {}
        self.total = self.done = 0
        self.results: dict[str, list[Result]] = {}
        self._titles: dict[tuple[str, str], str] = {}  # of the runs with a title, by name and id
        self._left = 0  # the work of the runs that have not ended; only `seconds_left` updates it
        self._not_counted, self._ended = list[Run](), list[Spec]()  # `seconds_left` adds and subtracts their work
        self._rates: list[float] = []  # seconds for a unit of work, for each run that was trained
        self.expect(runs)

    def expect(self, runs: Iterable[Run]) -> None:
        """Count more runs."""
        for run in runs:
            self.total += 1
            self.specs[run.title or run.name] = run.spec
            self._not_counted.append(run)
            if run.title:
                self._titles[run.name, run.id] = run.title
        self.several, self.seeds = self.total > 1, len(self.specs) < self.total

    def add(self, record: Record, seconds: float = 0.0) -> None:
        """Count a run that has ended after `seconds` of training; 0 if it was finished already."""
        self.done += 1
        self._ended.append(record.spec)
        if seconds:
            self._rates.append(seconds / work(record.spec))
        if isinstance(record, Finished):
            splits = record.metrics
            result = Result(
                train=splits.train.accuracy,
                validation=splits.validation.accuracy if splits.validation else None,
                test=splits.test.accuracy,
                images=splits.test.n,
                speed=stats.speed(record),
            )
            title = self._titles.get((record.name, record.spec_id), record.name)
            self.results.setdefault(title, []).append(result)

    def leave_out(self, run: Run) -> None:
        """Count one run less: it is neither finished nor trained."""
        self.total -= 1
        self._ended.append(run.spec)

    def seconds_left(self) -> float | None:
        """An estimate from the speed of the runs so far; None before the first has ended. It uses the median, since a
        run may have been paused with Ctrl-Z for an hour."""
        if not self._rates:
            return None
        # `work` imports torch, which a call that trains nothing does not need.
        self._left += sum(work(run.spec) for run in self._not_counted)
        self._not_counted = []
        while self._ended:
            self._left -= work(self._ended.pop())
        return median(self._rates) * self._left

    def validation(self, name: str) -> float | None:
        """The mean validation accuracy of an experiment so far; None if it has no validation images."""
        values = [result.validation for result in self.results[name] if result.validation is not None]
        return fmean(values) if values else None

    def ranked(self) -> list[str]:
        """The experiments with a finished run, best mean validation accuracy first, those without one last."""
        return sorted(self.results, key=lambda name: -(self.validation(name) or 0))
