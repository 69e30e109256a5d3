"""How much time and disk runs will take, from the records of earlier runs."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from core.data import datasets
from core.mode import COMPILED, Mode
from core.report import stats
from core.runs.record import Finished, Record
from core.spec import CIFAR10, Spec, static_key

ENOUGH = 5  # steps of a run that an estimate can be based on
RESUME_POINTS = 3  # of a run that is under way: two are kept while the next one is written


def work(spec: Spec) -> int:
    """What the time of a run is about proportional to."""
    return _parameters(spec) * spec["epochs"]


def _parameters(spec: Spec) -> int:
    from core.functional import model  # torch takes a second to import

    known = datasets.REGISTRY.get(spec["dataset"])  # the number of classes of another folder is not known here
    return model.parameter_count(spec, known.info if known else CIFAR10)


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
                for key in self._keys(record.spec, Mode.parse(there.mode)):
                    self.seconds[key] += examples / speed
                    self.work[key] += work(record.spec)

    def _keys(self, spec: Spec, mode: Mode) -> Iterator[Any]:
        """What a run is compared with, the closest first: runs of the same shape and kind of step, else of its
        precision. In a cohort, too, a run has taken its share of the time."""
        yield static_key(spec), mode.kind
        yield spec["precision"], mode.kind
        yield spec["precision"]

    def estimate(self, specs: Iterable[Spec], mode: Mode = COMPILED) -> Estimate:
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
