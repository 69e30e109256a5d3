"""The numbers of a report: runs grouped into experiments, means over seeds with intervals, paired comparisons."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median, median_high, stdev
from typing import Any, NamedTuple

from core import code_hash
from core.code_hash import same_numbers
from core.compare import Interval
from core.compare import interval as at_every_look
from core.data import cifar10
from core.runs.record import UNSET, Finished, Partial, Record
from core.spec import Spec, canonical

# Quantiles are from scipy.special: to import scipy.stats takes 0.7 s more.

ALPHA = 0.05  # of the intervals
Z = 1.959964  # 97.5% quantile of the normal distribution


class Group(list[Finished]):
    """An experiment: runs with one name whose specs differ in the seed alone, of the same code and data.

    Attributes:
        label: the name, with the keys that differ from other groups with this name.
        variant: another group with this name has the spec of experiments/.
    """

    def __init__(self, runs: Iterable[Finished], label: str, variant: bool = False) -> None:
        super().__init__(runs)
        self.label, self.variant = label, variant


Official = Callable[[str], Spec | None]


def groups(finished: Iterable[Finished], official: Official = lambda name: None) -> list[Group]:
    """The runs, grouped by name, spec without seed, code and data, in the order of the first run of each group.

    Args:
        official: the spec of experiments/ by name; see core.report.catalog.Catalog.spec.
    """
    by_name: dict[str, dict[tuple, list[Finished]]] = defaultdict(lambda: defaultdict(list))
    for record in finished:
        code = record.environment.code
        # Two runs of unknown code are not in one group: their code may differ.
        code_class = code in code_hash.SAME_NUMBERS or code or record.spec_id
        by_name[record.name][canonical({**record.spec, "seed": 0}), code_class, record.data].append(record)
    made = []
    for name, members in by_name.items():
        specs = {spec: runs[0].spec for (spec, *_), runs in members.items()}
        spec_now = official(name) if len(specs) > 1 else None
        base = canonical({**spec_now, "seed": 0}) if spec_now else ""
        for (spec, *_), runs in members.items():
            others = [specs[base]] if base in specs else list(specs.values())
            keys = [key for key in specs[spec] if key != "seed" and any(o[key] != specs[spec][key] for o in others)]
            values = ", ".join(f"{key} {shown(specs[spec][key])}" for key in keys)
            made.append(Group(runs, f"{name} ({values})" if keys else name, base in specs and spec != base))
    return made


class Results(NamedTuple):
    """The finished runs as experiments, in the order of the records."""

    compared: list[Group]  # with a validation split; every choice is made among them
    trained_on_all: list[Group]  # without one
    other: list[Group]  # of other code or on other data: their numbers may differ for that alone
    data: str  # of all but `other`
    dataset: str  # that all of these runs name
    other_datasets: dict[str, list[Group]]  # the runs of each other data set

    def has(self, record: Record) -> bool:
        """Whether a run is of this code and on this data."""
        return same_numbers(record.environment.code) and record.data == self.data


def results(records: Iterable[Record], official: Official = lambda name: None) -> Results:
    """The experiments. The data are CIFAR-10, or the most frequent data if no run has CIFAR-10.

    Args:
        official: as `groups` takes it.
    """
    by_dataset: dict[str, list[Finished]] = defaultdict(list)
    for record in records:
        if isinstance(record, Finished):
            by_dataset[record.spec["dataset"]].append(record)
    dataset = max(by_dataset, key=lambda name: (name == "cifar10", len(by_dataset[name]), name), default="cifar10")
    finished = by_dataset.pop(dataset, [])
    counts = Counter(record.data for record in finished)
    cifar = cifar10.DIRECTORY_HASH
    data = max(counts, key=lambda name: (name == cifar, counts[name], name), default=cifar)
    empty = Results([], [], [], data, dataset, {})
    current = [record for record in finished if empty.has(record)]
    compared = groups((record for record in current if record.metrics.validation), official)
    trained_on_all = groups((record for record in current if not record.metrics.validation), official)
    other = groups(record for record in finished if not empty.has(record))
    elsewhere = {name: groups(by_dataset[name]) for name in sorted(by_dataset)}
    return Results(compared, trained_on_all, other, data, dataset, elsewhere)


def grouped_by(finished: Iterable[Finished], key: str) -> list[Group]:
    """The runs, grouped by their value of one key of the spec, in the order of the values."""
    by_value: dict[str, list[Finished]] = defaultdict(list)
    for record in finished:
        by_value[canonical(record.spec[key])].append(record)
    ordered = sorted(by_value.values(), key=lambda runs: runs[0].spec[key])
    return [Group(runs, shown(runs[0].spec[key])) for runs in ordered]


def order(record: Record) -> tuple:
    """Sorts records: deeper networks first, so that a baseline is below them; then by learning rate."""
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


def gap(group: Group) -> float:
    """Train minus test accuracy, in points."""
    return 100 * (accuracy(group, "train") - accuracy(group, "test"))


def seconds(record: Finished | Partial) -> float:
    """The time of all steps, without compilation."""
    return sum(entry.seconds for entry in record.history)


def speed(record: Finished) -> int:
    """The median over the epochs, in samples a second; 0 if no epoch was timed."""
    speeds = [entry.samples_per_second for entry in record.history if entry.samples_per_second]
    return median_high(speeds) if speeds else 0


# Times


def machine(record: Finished) -> tuple[str, str, int]:
    """The name of the device, its hardware and the threads. Times of different machines cannot be compared."""
    where = record.environment
    # The hardware of a run in bfloat16 names the threads, too.
    return where.device_name, where.hardware.removesuffix(f", {where.threads} threads"), where.threads


def timed(group: Sequence[Finished]) -> list[Finished]:
    """The runs of the machine that trained the first seed. Seeds that another machine adds do not change the time."""
    first = machine(min(group, key=lambda record: record.seed))
    return [record for record in group if machine(record) == first]


def training(group: Sequence[Finished]) -> float:
    """The median time of training on one machine, in seconds."""
    return median(map(seconds, timed(group)))


# As text


def where(group: Sequence[Finished]) -> str:
    """The machine of the times: 'A processor, 2 threads'."""
    environment = timed(group)[0].environment
    if environment.device != "cpu":
        return environment.device_name
    threads = "1 thread" if environment.threads == 1 else f"{environment.threads} threads"
    return f"{environment.device_name}, {threads}"


def shown(value: Any) -> str:
    """A value of a spec: 0.001, batch, 1024-512."""
    if isinstance(value, list):
        return "-".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """'57.12%' for 0.5712."""
    return f"{100 * value:.2f}%"


def spread(accuracies: Sequence[float]) -> str:
    """'57.12 ± 0.31%': mean and sample standard deviation; '57.12%' for one value."""
    if len(accuracies) == 1:
        return percent(accuracies[0])
    return f"{100 * fmean(accuracies):.2f} ± {100 * stdev(accuracies):.2f}%"


def spread_on(group: Sequence[Finished], split: str) -> str:
    """`spread` on a split; "none" if the runs have no images there."""
    return spread(accuracies(group, split)) if getattr(group[0].metrics, split) else "none"


# Intervals


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95% interval of an accuracy measured on n examples (Wilson 1927)."""
    center = (accuracy + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(accuracy * (1 - accuracy) / n + Z * Z / (4 * n * n))
    return center - half, center + half


def half_width(values: list[float], alpha: float = ALPHA) -> float:
    """Half of the interval of the mean of two or more values (Student's t), which is wrong with probability `alpha`."""
    from scipy import special

    return stdev(values) / math.sqrt(len(values)) * float(special.stdtrit(len(values) - 1, 1 - alpha / 2))


def mean_interval(group: Group, split: str) -> tuple[float, float]:
    """The 95% interval of the mean accuracy over the seeds; for one run, that of its accuracy."""
    values = accuracies(group, split)
    if len(values) == 1:
        return interval(values[0], getattr(group[0].metrics, split).n)
    mean, half = fmean(values), half_width(values)
    return mean - half, mean + half


# Comparisons


def _pairs(a: Group, b: Group) -> list[tuple[Finished, Finished]]:
    """The runs with the same seed, in the order of the seeds."""
    by_seed = {record.seed: record for record in b}
    return [(record, by_seed[record.seed]) for record in sorted(a, key=lambda r: r.seed) if record.seed in by_seed]


def compare(a: Group, b: Group, split: str, rows: int = 1) -> Interval:
    """The accuracy of `a` minus that of `b`, in points, paired over the seeds that both have. With fewer than two such
    seeds, the mean is that over all seeds of each group, and the interval is infinite.

    Args:
        rows: the 95% intervals of so many comparisons are valid together, and at every look (core.compare) from
            `first_look` seeds on. With fewer seeds, each is that of one look.
    """
    pairs = _pairs(a, b)
    if len(pairs) < 2:
        return Interval(100 * (accuracy(a, split) - accuracy(b, split)), math.inf, 0.0, len(pairs))
    of_a, of_b = (accuracies(runs, split) for runs in zip(*pairs, strict=True))
    differences = [one - other for one, other in zip(of_a, of_b, strict=True)]
    # Few seeds can have equal differences by chance: less than one image is never significant.
    least = 1 / getattr(a[0].metrics, split).n
    mean, half, deviation, n = at_every_look(differences, ALPHA / rows, least)
    half = max(half_width(differences, ALPHA / rows), least) if half == math.inf else half
    return Interval(100 * mean, 100 * half, 100 * deviation, n)


def image_by_image(a: Group, b: Group) -> tuple[int, int, float] | None:
    """How many test images only `a` gets right, how many only `b`, and the p value of the exact McNemar test.

    It takes the first seed for which both groups recorded which images were right; None if there is none. Other seeds
    have the same images, which are not new evidence.
    """
    from scipy import special

    for one, other in _pairs(a, b):
        if one.answers is UNSET or other.answers is UNSET or one.metrics.test.n != other.metrics.test.n:
            continue
        x, y = int.from_bytes(one.answers.right), int.from_bytes(other.answers.right)
        only_a, only_b = (x & ~y).bit_count(), (y & ~x).bit_count()
        # Two-sided: twice the probability that of so many fair coins at most min(only_a, only_b) show heads.
        return only_a, only_b, min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    return None


def over_images(pairs: Sequence[tuple[Finished, Finished]]) -> float | None:
    """Half of the 95% interval, over other test images, of a difference: the mean test accuracy of the first networks
    minus that of the second. None if a record does not say which images were right."""
    import numpy as np

    def right(record: Finished) -> "np.ndarray":
        bits = np.frombuffer(record.answers.right, np.uint8)  # type: ignore[union-attr]
        return np.unpackbits(bits, count=record.metrics.test.n).astype(np.int64)

    if any(record.answers is UNSET for pair in pairs for record in pair):
        return None
    differences = sum(right(a) - right(b) for a, b in pairs) / len(pairs)
    return Z * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
