"""The numbers of a report: groups of runs, means over seeds, intervals of accuracies, speeds."""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, median_high, stdev

from core.runs.record import Finished
from core.spec import canonical

Group = list[Finished]  # runs of one name whose specs differ in the seed alone


def groups(finished: Iterable[Finished]) -> list[Group]:
    """The runs, grouped by name and by the spec without its seed, in the order of the first run of each group."""
    found: dict[tuple[str, str], Group] = defaultdict(list)
    for record in finished:
        found[record.name, canonical({**record.spec, "seed": 0})].append(record)
    return list(found.values())


def ranked(groups: Iterable[Group]) -> list[Group]:
    """The groups, the best mean validation accuracy first."""
    return sorted(groups, key=lambda group: -accuracy(group, "validation"))


def accuracies(group: Group, split: str) -> list[float]:
    """The accuracy of every run on "train", "validation" or "test"."""
    return [getattr(record.metrics, split).accuracy for record in group]


def accuracy(group: Group, split: str) -> float:
    """The mean accuracy over the seeds."""
    return fmean(accuracies(group, split))


def spread(group: Group, split: str) -> str:
    """'57.12 ± 0.31%', mean and sample standard deviation over the seeds; '57.12%' of one run."""
    if len(group) == 1:
        return percent(accuracy(group, split))
    return f"{100 * accuracy(group, split):.2f} ± {100 * stdev(accuracies(group, split)):.2f}%"


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95% interval of an accuracy measured on n examples (Wilson 1927)."""
    z = 1.959964
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return center - half, center + half


def percent(value: float) -> str:
    """'57.12%' for 0.5712."""
    return f"{100 * value:.2f}%"


def seconds(record: Finished) -> float:
    """The time of all steps, without compilation."""
    return sum(entry.seconds for entry in record.history)


def speed(record: Finished) -> int:
    """The median over the epochs, in samples a second; 0 where none was timed."""
    speeds = [entry.samples_per_second for entry in record.history if entry.samples_per_second]
    return median_high(speeds) if speeds else 0
