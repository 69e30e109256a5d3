"""How far the runs of a call are."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from core.estimate import work
from core.report import stats
from core.runs.record import Finished, Record
from core.runs.run import Run
from core.spec import Spec


class Result(NamedTuple):
    """What is kept in memory of a finished run: the accuracies, the number of test images, samples a second."""

    train: float
    validation: float | None  # None where all images were trained on
    test: float
    images: int
    speed: int


class Tally:
    """How far the runs of a call are, and what their experiments have reached. It keeps no records.

    Attributes:
        specs: by the names of the experiments.
        total, done: the number of runs, and of those that have ended.
        several, seeds: whether the call has several runs, and an experiment several seeds.
        results: of the finished runs, by the name of their experiment.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.specs = {run.name: run.spec for run in runs}
        self.total, self.done = len(runs), 0
        self.several, self.seeds = self.total > 1, len(self.specs) < self.total
        self.results: dict[str, list[Result]] = {}
        self._left = 0  # the work of the runs that have not ended; `seconds_left` brings it up to date
        self._not_counted, self._ended = list(runs), list[Spec]()  # what `seconds_left` adds to it, and takes away
        self._rates: list[float] = []  # seconds for a unit of work, of each run of this call

    def add(self, record: Record, seconds: float = 0.0) -> None:
        """Count a run that has ended; `seconds` is what it took, 0 where it was finished already."""
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
            self.results.setdefault(record.name, []).append(result)

    def leave_out(self, run: Run) -> None:
        """Do not count a run of the call: it is neither finished nor trained."""
        self.total -= 1
        self._ended.append(run.spec)

    def seconds_left(self) -> float | None:
        """As fast as the runs of this call so far; None before the first has ended. The median, since one of them may
        have been stopped with Ctrl-Z for an hour."""
        if not self._rates:
            return None
        # Only here, after a run has been trained: `work` imports torch, and a call that trains nothing need not.
        self._left += sum(work(run.spec) for run in self._not_counted)
        self._not_counted = []
        while self._ended:
            self._left -= work(self._ended.pop())
        return median(self._rates) * self._left

    def validation(self, name: str) -> float | None:
        """The mean validation accuracy of an experiment over its runs so far, if it has one."""
        found = [result.validation for result in self.results[name] if result.validation is not None]
        return fmean(found) if found else None

    def ranked(self) -> list[str]:
        """The experiments with a finished run, the best mean validation accuracy first, those that have none last."""
        return sorted(self.results, key=lambda name: -(self.validation(name) or 0))
