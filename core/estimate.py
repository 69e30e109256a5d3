"""Estimates the time and disk space of runs from the records of earlier runs."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from core.data import datasets
from core.mode import Kind, Mode
from core.report import stats
from core.runs.record import Finished, Record
from core.spec import CIFAR10, Spec, static_key

ENOUGH = 5  # an estimate needs a run of at least so many steps
RESUME_POINTS = 3  # of a run in progress: two are kept while the next one is written


def work(spec: Spec) -> int:
    """Parameters times epochs: the time of a run is about proportional to it."""
    return _parameters(spec) * spec["epochs"]


def _parameters(spec: Spec) -> int:
    from core.functional import model  # torch takes a second to import

    known = datasets.REGISTRY.get(spec["dataset"])  # the number of classes of another folder is not known here
    return model.parameter_count(spec, known.info if known else CIFAR10)


class Estimate(NamedTuple):
    """Time and disk space of runs.

    Attributes:
        seconds: of their steps, one run after the other; None if no similar run was measured.
        kept: bytes of their weights and records.
        meanwhile: bytes of the resume points of the largest run while it is trained.
    """

    seconds: float | None
    kept: int
    meanwhile: int


class Measured:
    """The time that finished runs took on one device for a unit of work. Runs of fewer than ENOUGH steps are
    ignored."""

    def __init__(self, records: Iterable[Record], device_name: str, threads: int) -> None:
        """`threads`: the number of threads of a CPU; runs with another number are ignored."""
        self.seconds: dict[Any, float] = defaultdict(float)
        self.work: dict[Any, int] = defaultdict(int)
        for record in records:
            environment = record.environment
            same_threads = environment.device != "cpu" or environment.threads == threads
            if not isinstance(record, Finished) or environment.device_name != device_name or not same_threads:
                continue
            examples = record.metrics.train.n * record.spec["epochs"]
            speed = stats.speed(record)
            if speed and examples >= ENOUGH * record.spec["batch_size"]:
                for key in self._keys(record.spec, Mode.parse(environment.mode).kind):
                    self.seconds[key] += examples / speed
                    self.work[key] += work(record.spec)

    def _keys(self, spec: Spec, kind: Kind) -> Iterator[Any]:
        """Groups of similar runs, the most similar first. A run of a cohort has only its share of the time, so the size
        of the cohort does not matter."""
        yield static_key(spec), kind
        yield spec["precision"], kind
        yield spec["precision"]

    def estimate(self, specs: Iterable[Spec], compiled: bool = True) -> Estimate:
        seconds: float | None = 0.0
        kept = meanwhile = 0
        for spec in specs:
            kind: Kind = "compiled" if compiled and datasets.worth_compiling(spec["dataset"]) else "eager"
            key = next((key for key in self._keys(spec, kind) if key in self.work), None)
            if key is None or seconds is None:
                seconds = None
            else:
                seconds += self.seconds[key] * work(spec) / self.work[key]
            kept += 4 * _parameters({**spec, "whiten": 0}) + 4_000 + 220 * spec["epochs"]  # the weights, the record
            tensors = 3 + (spec["ema"] > 0)  # the weights, Adam's two moments, the average
            meanwhile = max(meanwhile, RESUME_POINTS * tensors * 4 * _parameters(spec))
        return Estimate(seconds, kept, meanwhile)
