"""Many runs: grids become named experiments, seeds become runs; what they will take, and how far they are. Knows no
tensor."""

import hashlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from core.errors import UserError
from core.report import stats
from core.runs.record import MAX_NAME, Finished, Record, check_name
from core.spec import FIELDS, Spec, SpecError, nearest, plain, resolve, static_key

LIMIT = 10_000  # runs of one call
ENOUGH = 5  # steps of a run that an estimate can be based on
RESUME_POINTS = 3  # of a run that is under way: two are kept while the next one is written

Experiments = dict[str, dict[str, Any]]  # name -> spec as experiments/ has it
Suites = Mapping[str, Mapping[str, Mapping[str, Any]]]  # name -> experiments and grids
Run = tuple[str, Spec]  # the name of its experiment, and its resolved spec


# From what is written in experiments/ to runs


def expand(name: str, spec: Mapping[str, Any]) -> Experiments:
    """The experiments that a spec stands for: one for every combination of the values that it lists, in the order in
    which they are written; itself where it lists none. An axis may also be a tuple, a range or a NumPy array.

    Raises:
        UserError: there are none or too many, or two have one name.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"experiment {name}: a spec is a dict, found {type(spec).__name__}")
    spec = {key: plain(value) for key, value in spec.items()}
    axes = {key: values for key, values in spec.items() if _is_axis(key, values)}
    for key, values in axes.items():
        if key == "seed" or not values:
            expected = "one seed; --seeds trains several" if key == "seed" else "at least one value"
            raise UserError(f"experiment {name}: {key} = {values}, expected {expected}")
    if (count := math.prod(map(len, axes.values()))) > LIMIT:
        raise UserError(f"experiment {name}: its grid has {count:,} members, expected at most {LIMIT:,}")
    found: Experiments = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        member = _short("-".join([name, *(f"{key}={_text(value)}" for key, value in point.items())]))
        if member in found:
            raise UserError(f"experiment {name}: two members of its grid are named {member}")
        found[member] = {**spec, **point}
    return found


def _is_axis(key: str, value: Any) -> bool:
    """Whether it is a list of values. A value may itself be a list (widths); then a list of lists is meant."""
    if key in FIELDS and isinstance(FIELDS[key].default, list):
        return isinstance(value, list) and any(isinstance(each, list) for each in value)
    return isinstance(value, list)


def _text(value: Any) -> str:
    """A value in a name: 0.001, relu, 1024x512."""
    if isinstance(value, list):
        return "x".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _short(name: str) -> str:
    """A name that an experiment may have: of one that is too long the beginning, and a hash of all of it."""
    if len(name) <= MAX_NAME:
        return name
    tail = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: MAX_NAME - len(tail) - 1]}-{tail}"


def catalog(suites: Suites) -> dict[str, Experiments]:
    """Every name that can be asked for, and the experiments that it stands for: a suite, a grid or one experiment.

    Raises:
        UserError: a name stands for two different things, a suite has no valid name, or a grid cannot be expanded.
    """
    found: dict[str, Experiments] = {}

    def add(name: str, members: Experiments) -> None:
        if found.setdefault(name, members) != members:
            raise UserError(f"the name {name} stands for two different things in experiments/; rename one of them")

    for suite, specs in suites.items():
        check_name(suite, "a suite")
        everything: Experiments = {}
        for name, spec in specs.items():
            grid = expand(name, spec)
            for member in grid:
                add(member, {member: grid[member]})
            add(name, grid)
            everything |= grid
        add(suite, everything)
    return found


def experiments(suites: Suites) -> Experiments:
    """Every experiment, by its name."""
    return {name: spec for members in catalog(suites).values() for name, spec in members.items()}


def pick(suites: Suites, names: Iterable[str]) -> Experiments:
    """The experiments that these names stand for; UserError where one is unknown."""
    known, picked = catalog(suites), Experiments()
    for name in names:
        if name not in known:
            written = dict.fromkeys([*suites, *(name for suite in suites.values() for name in suite)])
            raise UserError(f"unknown experiment {name!r}{nearest(name, list(written))}")
        picked |= known[name]
    return picked


def resolved(name: str, spec: Mapping[str, Any]) -> Spec:
    """The whole spec of an experiment; UserError names the experiment where it, or its name, is not valid."""
    try:
        found = resolve(spec)
    except SpecError as error:
        raise UserError(f"experiment {name}: {error}") from None
    check_name(name)
    return found


def parse_seeds(text: str) -> Sequence[int]:
    """'5' is the seeds 0 to 4, '3,7,11' these three."""
    numbers = [int(n) for n in text.split(",")] if re.fullmatch(r"[0-9]{1,10}(,[0-9]{1,10})*", text) else [0]
    seeds = numbers if len(numbers) > 1 else range(numbers[0])
    if not seeds or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}, expected how many (5 is the seeds 0 to 4) or which (3,7,11, each once)")
    return seeds


def runs(
    experiments: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Any], seeds: Sequence[int] | None = None
) -> list[Run]:
    """The runs of these experiments, resolved: all of them with the first seed, then with the next, so that a sweep
    that is stopped early has compared all of them.

    Raises:
        UserError: a spec is not valid, or there are too many runs.
    """
    if (count := len(experiments) * (1 if seeds is None else len(seeds))) > LIMIT:
        raise UserError(f"{count:,} runs, expected at most {LIMIT:,} in one call")
    changes = [{**overrides}] if seeds is None else [{**overrides, "seed": seed} for seed in seeds]
    return [(name, resolved(name, {**spec, **change})) for change in changes for name, spec in experiments.items()]


def parse_cohort(text: str) -> int:
    """'off' is 1."""
    if text == "off":
        return 1
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise UserError(f"--cohort {text}, expected off, or how many runs at once, at most 256")
    return int(text)


def cohorts(runs: Iterable[Run], size: int) -> list[list[Run]]:
    """The runs in groups of at most `size` that can be trained together (see core.session.run_cohort), in the order of
    the first run of each."""
    groups: list[list[Run]] = []
    growing: dict[Any, list[Run]] = {}
    for run in runs:
        key = static_key(run[1]), run[1]["epochs"]
        if len(growing.get(key, [])) % size == 0:
            growing[key] = []
            groups.append(growing[key])
        growing[key].append(run)
    return groups


# What runs will take


def work(spec: Spec) -> int:
    """What the time of a run is about proportional to."""
    return _parameters(spec) * spec["epochs"]


def _parameters(spec: Spec) -> int:
    from core.functional import model  # torch takes a second to import

    return model.parameter_count(spec)


class Estimate(NamedTuple):
    """What runs will take.

    Attributes:
        seconds: of their steps, one run after the other; None where nothing like them was measured.
        kept: bytes of their weights and records.
        meanwhile: bytes of the resume points of the largest of them, while it is trained.
    """

    seconds: float | None
    kept: int
    meanwhile: int


class Measured:
    """How long finished runs took on one device, for each unit of work. A run of fewer than ENOUGH steps says
    nothing."""

    def __init__(self, records: Iterable[Record], device_name: str, threads: int) -> None:
        """`threads`: as many as the runs on a CPU must have had."""
        self.seconds: dict[Any, float] = defaultdict(float)
        self.work: dict[Any, int] = defaultdict(int)
        for record in records:
            there = record.environment
            here = there.device_name == device_name and (there.device != "cpu" or there.threads == threads)
            if not isinstance(record, Finished) or not here:
                continue
            examples = record.metrics.train.n * record.spec["epochs"]
            speed = stats.speed(record)
            if speed and examples >= ENOUGH * record.spec["batch_size"]:
                for key in self._keys(record.spec, there.mode):
                    self.seconds[key] += examples / speed
                    self.work[key] += work(record.spec)

    def _keys(self, spec: Spec, mode: str) -> Iterator[Any]:
        """What a run is compared with, the closest first: runs of the same shape and mode, else of its
        precision."""
        mode = mode.split(",")[0]  # in a cohort, too, a run has taken its share of the time
        yield static_key(spec), mode
        yield spec["precision"], mode
        yield spec["precision"]

    def estimate(self, specs: Iterable[Spec], mode: str = "compiled") -> Estimate:
        seconds: float | None = 0.0
        kept = meanwhile = 0
        for spec in specs:
            key = next((key for key in self._keys(spec, mode) if key in self.work), None)
            if key is None or seconds is None:
                seconds = None
            else:
                seconds += self.seconds[key] * work(spec) / self.work[key]
            kept += 4 * _parameters({**spec, "whiten": 0}) + 4_000 + 220 * spec["epochs"]  # the weights, the record
            copies = 3 + (spec["ema"] > 0)  # the weights, Adam's two moments, the average
            meanwhile = max(meanwhile, RESUME_POINTS * copies * 4 * _parameters(spec))
        return Estimate(seconds, kept, meanwhile)


# How far runs are


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
        total, done: the number of runs, and of those that have ended.
        seeds: whether an experiment has several.
        results: of the finished runs, by the name of their experiment.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.specs = dict(runs)
        self.total, self.done = len(runs), 0
        self.seeds = len(self.specs) < self.total
        self.results: dict[str, list[Result]] = {}
        self._left = 0  # the work of the runs that have not ended; `seconds_left` brings it up to date
        self._not_counted, self._ended = runs, list[Spec]()  # what `seconds_left` has to add to it, and to take away
        self._rates: list[float] = []  # seconds for a unit of work, of each run of this call

    def label(self, name: str, seed: int) -> str:
        """A run in a line of output: with its seed where there are several."""
        return f"{name} seed {seed}" if self.seeds else name

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

    def leave_out(self, spec: Spec) -> None:
        """Do not count a run of the call: it is neither finished nor trained."""
        self.total -= 1
        self._ended.append(spec)

    def seconds_left(self) -> float | None:
        """As fast as the runs of this call so far; None before the first has ended. The median, since one of them may
        have been stopped with Ctrl-Z for an hour."""
        if not self._rates:
            return None
        # Only here, after a run has been trained: `work` imports torch, and a call that trains nothing need not.
        self._left += sum(work(spec) for _, spec in self._not_counted)
        self._not_counted = ()
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
