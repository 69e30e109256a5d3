"""The numbers of a report: experiments as groups of runs, means over seeds with intervals, paired comparisons."""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median_high, stdev
from typing import Any, NamedTuple

from core.code_hash import same_numbers
from core.data import cifar10
from core.runs.record import UNSET, Finished, Record
from core.spec import canonical


class Group(list[Finished]):
    """An experiment: runs of one name whose specs differ in the seed alone, of code that gives the same numbers and on
    the same data.

    `label` is the name, with the keys of the spec that tell the group from others of its name.
    """

    def __init__(self, runs: Iterable[Finished], label: str) -> None:
        super().__init__(runs)
        self.label = label


DIFFERENCE = 0.002  # worth finding: 0.2 points
POWER = 0.8  # how often as many seeds as `needed` says find it
MOST = 100_000  # seeds


def groups(finished: Iterable[Finished]) -> list[Group]:
    """The runs, grouped by name, by the spec without its seed, by code and by data, in the order of the first run of
    each group."""
    found: dict[str, dict[tuple, list[Finished]]] = defaultdict(lambda: defaultdict(list))
    codes: list[str] = []
    for record in finished:
        code = record.environment.code
        same = next((known for known in codes if same_numbers(code, known)), None)
        if same is None:
            codes.append(code)
            same = code or record.spec_id  # unknown code is like no other code, not even like itself
        found[record.name][canonical({**record.spec, "seed": 0}), same, record.data].append(record)
    made = []
    for name, alike in found.items():
        specs = [runs[0].spec for runs in alike.values()]
        different = [key for key in specs[0] if key != "seed" and any(s[key] != specs[0][key] for s in specs)]
        for runs in alike.values():
            keys = ", ".join(f"{key} {shown(runs[0].spec[key])}" for key in different)
            made.append(Group(runs, f"{name} ({keys})" if keys else name))
    return made


class Results(NamedTuple):
    """The finished runs as experiments, in the order of the records.

    Attributes:
        compared: they have a validation split, and so take part in choices.
        whole: they were trained on all images, and have no validation accuracy.
        apart: runs of other code or on other data. They take part in nothing, since that alone may change a number.
        data: the data of the others.
    """

    compared: list[Group]
    whole: list[Group]
    apart: list[Group]
    data: str

    def has(self, record: Record) -> bool:
        """Whether a run is of this code and on this data."""
        return same_numbers(record.environment.code) and record.data == self.data


def results(records: Iterable[Record]) -> Results:
    """What is compared, and what is shown apart. The data are CIFAR-10, or where no run has that, what most have."""
    finished = [record for record in records if isinstance(record, Finished)]
    data = Counter(record.data for record in finished)
    usual = max(
        data, key=lambda name: (name == cifar10.DIRECTORY_HASH, data[name], name), default=cifar10.DIRECTORY_HASH
    )
    parts = Results([], [], [], usual)
    ours = [record for record in finished if parts.has(record)]
    return Results(
        groups(record for record in ours if record.metrics.validation),
        groups(record for record in ours if not record.metrics.validation),
        groups(record for record in finished if not parts.has(record)),
        usual,
    )


def grouped_by(finished: Iterable[Finished], key: str) -> list[Group]:
    """The runs, grouped by their value of one key of the spec, in the order of the values."""
    found: dict[str, list[Finished]] = defaultdict(list)
    for record in finished:
        found[canonical(record.spec[key])].append(record)
    runs = sorted(found.values(), key=lambda runs: runs[0].spec[key])
    return [Group(each, shown(each[0].spec[key])) for each in runs]


def order(record: Record) -> tuple:
    """Sorts the records: by network, deeper first, so a baseline stands below the runs it is compared with; then by
    learning rate."""
    spec = record.spec
    return -len(spec["widths"]), spec["widths"], spec["norm"], -spec["lr"], record.name, spec["seed"]


def ranked(groups: Iterable[Group]) -> list[Group]:
    """The groups, the best mean validation accuracy first."""
    return sorted(groups, key=lambda group: -accuracy(group, "validation"))


def accuracies(group: Iterable[Finished], split: str) -> list[float]:
    """The accuracy of every run on "train", "validation" or "test"."""
    return [getattr(record.metrics, split).accuracy for record in group]


def accuracy(group: Group, split: str) -> float:
    """The mean accuracy over the seeds."""
    return fmean(accuracies(group, split))


def shown(value: Any) -> str:
    """A value of a spec: 0.001, batch, 1024-512."""
    if isinstance(value, list):
        return "-".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """'57.12%' for 0.5712."""
    return f"{100 * value:.2f}%"


def spread(accuracies: Sequence[float]) -> str:
    """'57.12 ± 0.31%', mean and sample standard deviation; '57.12%' of one value."""
    deviation = f" ± {100 * stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * fmean(accuracies):.2f}{deviation}%"


def seconds(record: Finished) -> float:
    """The time of all steps, without compilation."""
    return sum(entry.seconds for entry in record.history)


def speed(record: Finished) -> int:
    """The median over the epochs, in samples a second; 0 where none was timed."""
    speeds = [entry.samples_per_second for entry in record.history if entry.samples_per_second]
    return median_high(speeds) if speeds else 0


# Intervals


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95% interval of an accuracy measured on n examples (Wilson 1927)."""
    z = 1.959964
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return center - half, center + half


def half_width(values: list[float]) -> float:
    """Half of the 95% interval of the mean of two or more values (Student's t)."""
    from scipy import special  # which `main.py list` need not wait for; scipy.stats takes 0.5 s and 50 MB more

    return stdev(values) / math.sqrt(len(values)) * float(special.stdtrit(len(values) - 1, 0.975))


def mean_interval(group: Group, split: str) -> tuple[float, float]:
    """The 95% interval of the mean accuracy over the seeds; of one run, the interval of its accuracy."""
    values = accuracies(group, split)
    if len(values) == 1:
        return interval(values[0], getattr(group[0].metrics, split).n)
    mean, half = fmean(values), half_width(values)
    return mean - half, mean + half


# Comparisons


class Difference(NamedTuple):
    """How much better one group is than another.

    Attributes:
        mean, half: the difference of the accuracies, and half of its 95% interval.
        deviation: the standard deviation of the differences of single seeds; 0 where there are less than two.
        seeds: how many seeds both have. With two or more, the difference is the mean over these seeds, paired.
            Otherwise it is that of the means, and the interval is the sampling error of two accuracies as if each were
            measured on images of its own. It says nothing of other seeds.
    """

    mean: float
    half: float
    deviation: float
    seeds: int

    @property
    def paired(self) -> bool:
        return self.seeds > 1

    @property
    def told(self) -> bool:
        """Whether the difference is more than chance."""
        return abs(self.mean) > self.half


def _pairs(a: Group, b: Group) -> list[tuple[Finished, Finished]]:
    """The runs of the same seed, in the order of the seeds."""
    by_seed = {record.seed: record for record in b}
    return [(record, by_seed[record.seed]) for record in sorted(a, key=lambda r: r.seed) if record.seed in by_seed]


def compare(a: Group, b: Group, split: str) -> Difference:
    """The accuracy of `a` less that of `b`."""
    pairs = _pairs(a, b)
    if len(pairs) > 1:
        ours, theirs = (accuracies(runs, split) for runs in zip(*pairs, strict=True))
        differences = [one - other for one, other in zip(ours, theirs, strict=True)]
        # Equal differences of few seeds are chance: less than an image cannot be told.
        half = max(half_width(differences), 1 / getattr(a[0].metrics, split).n)
        return Difference(fmean(differences), half, stdev(differences), len(pairs))
    variance = 0.0
    for group in (a, b):
        p = accuracy(group, split)
        variance += p * (1 - p) / getattr(group[0].metrics, split).n
    return Difference(accuracy(a, split) - accuracy(b, split), 1.959964 * math.sqrt(variance), 0.0, len(pairs))


def needed(deviation: float, difference: float = DIFFERENCE) -> int:
    """How many seeds a paired t-test (5%, two-sided) needs to find a true difference in `POWER` of all cases.

    Args:
        deviation: the standard deviation of the differences of single seeds.

    Returns:
        At least 2 and at most MOST.
    """
    from scipy import special

    if deviation == 0:
        return 2

    def enough(n: int) -> bool:
        critical = special.fdtri(1, n - 1, 0.95)  # of t squared, whose distribution scipy knows for large n too
        shift = min(n * (difference / deviation) ** 2, 500)  # more is as good as certain
        return special.ncfdtr(1, n - 1, shift, critical) <= 1 - POWER

    return 2 + bisect_left(range(2, MOST), True, key=enough)


class Discordance(NamedTuple):
    """Two runs of one seed, image by image.

    Attributes:
        n: how many images there are.
        first, second: how many of them only the one run gets right, and only the other.
        p: how likely it is that they are so unequal by chance (exact McNemar test).
    """

    seed: int
    n: int
    first: int
    second: int
    p: float


def image_by_image(a: Group, b: Group) -> Discordance | None:
    """The first seed of which both groups have kept which test images were right; None where there is none.

    One seed and no more: the images of several seeds are the same images, so they must not be counted as more.
    """
    from scipy import special

    for one, other in _pairs(a, b):
        if one.answers is UNSET or other.answers is UNSET or one.metrics.test.n != other.metrics.test.n:
            continue
        x, y = int.from_bytes(one.answers.right), int.from_bytes(other.answers.right)
        first, second = (x & ~y).bit_count(), (y & ~x).bit_count()
        # How likely it is that of so many fair coins no more are heads; twice, for no more tails.
        p = min(1.0, 2 * float(special.bdtr(min(first, second), first + second, 0.5)))
        return Discordance(one.seed, one.metrics.test.n, first, second, p)
    return None
