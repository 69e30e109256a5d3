"""Counts the runs of a call: how many are done, how long the rest takes, which experiment is best."""

from collections import Counter
from collections.abc import Iterable
from statistics import fmean, median

from core.estimate import work
from core.runs.record import Finished, Record
from core.runs.run import Run
from core.spec import Spec


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
        self.results: dict[str, list[Finished]] = {}
        self._left = Counter[str]()  # the number of runs that have not ended, by title
        self._work: dict[str, int] = {}  # of a run, by title
        self._rates: list[float] = []  # seconds for a unit of work, for each run that was trained
        self.expect(runs)

    def expect(self, runs: Iterable[Run]) -> None:
        """Count more runs."""
        for run in runs:
            title = run.title or run.name
            self.total += 1
            self.specs[title] = run.spec
            self._left[title] += 1
        self.several, self.seeds = self.total > 1, len(self.specs) < self.total

    def add(self, record: Record, seconds: float = 0.0, title: str = "") -> None:
        """Count a run that has ended.

        Args:
            seconds: of its training; 0 if it was finished already.
            title: of its experiment; by default, the name in the record.
        """
        title = title or record.name
        self.done += 1
        self._left[title] -= 1
        if seconds:
            self._rates.append(seconds / work(record.spec))
        if isinstance(record, Finished):
            self.results.setdefault(title, []).append(record)

    def leave_out(self, run: Run) -> None:
        """Count one run less: it is neither finished nor trained."""
        self.total -= 1
        self._left[run.title or run.name] -= 1

    def seconds_left(self) -> float | None:
        """An estimate from the speed of the runs so far; None before the first has ended. It uses the median, since a
        run may have been paused with Ctrl-Z for an hour."""
        if not self._rates:
            return None
        # `work` imports torch, which a call that trains nothing does not need.
        self._work |= {title: work(self.specs[title]) for title in self.specs.keys() - self._work.keys()}
        return median(self._rates) * sum(count * self._work[title] for title, count in self._left.items())

    def validation(self, name: str) -> float | None:
        """The mean validation accuracy of an experiment so far; None if it has no validation images."""
        values = [r.metrics.validation.accuracy for r in self.results[name] if r.metrics.validation]
        return fmean(values) if values else None

    def ranked(self) -> list[str]:
        """The experiments with a finished run, best mean validation accuracy first, those without one last."""
        return sorted(self.results, key=lambda name: -(self.validation(name) or 0))
