"""Compares experiments over seeds until the answer is clear: what the records say so far, and which runs to make next.

Every decision is by the validation accuracy of records, paired by seed. Nothing here reads a test number.

The interval of a mean difference is valid at every look: all intervals, after each seed and of all pairs, contain the
true differences with the asked confidence, so one may look and stop at any time. It holds each mean whose Bayes factor
in a t test, with a standard normal prior on the effect size, is below 1/alpha. This scale-invariant mixture is a
martingale (Lai 1976, Annals of Statistics 4; Wang and Ramdas 2023, arXiv:2310.03722). It assumes normal differences.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from core.errors import UserError
from core.runs import layout
from core.runs.record import UNSHOWN, Failed, Finished, Name, Record, Text, new_name
from core.spec import Spec, canonical, resolve, spec_id

DIFFERENCE = 0.5  # points of accuracy: a smaller difference does not matter
GROWTH = 4  # a round has a quarter more seeds than the one before
MAX_CANDIDATES = 20
MAX_SEEDS = 1_000  # of a question
NEEDED = 100_000  # the most seeds that `needed` tells
WHAT = "a question that `compare` has written"


class QuestionError(UserError, ValueError):
    """A question has no answer; the message says why."""


# Statistics


def half_width(deviation: float, n: int, alpha: float) -> float:
    """Half of the interval for the mean of n values, valid at every n at once with probability 1 - alpha.

    Args:
        deviation: the sample standard deviation of the values.

    Returns:
        infinity if n is too small for any interval.
    """
    power = (alpha * alpha / (n + 1)) ** (1 / n)
    rest = power - 1 / (n + 1)
    return deviation * math.sqrt((n - 1) / n * (1 - power) / rest) if n > 1 and rest > 0 else math.inf


def first_look(alpha: float) -> int:
    """The smallest number of values that has an interval."""
    return next(n for n in range(2, NEEDED) if half_width(1, n, alpha) < math.inf)


class Interval(NamedTuple):
    """A mean difference, in points, and half of its interval."""

    mean: float
    half: float
    deviation: float  # of single values
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval does not contain 0."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if self.half < math.inf else f"{self.mean:.2f} (too few seeds)"


def interval(values: Sequence[float], alpha: float, least: float = 0.0) -> Interval:
    """The mean of the values with `half_width`, which is at least `least`."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    mean = fmean(values) if values else 0.0
    return Interval(mean, max(least, half_width(deviation, len(values) or 1, alpha)), deviation, len(values))


def needed(found: Interval, within: float, alpha: float) -> int:
    """How many values decide, at most NEEDED, if mean and deviation stay what they are."""
    width = max(abs(found.mean), within - abs(found.mean))
    return bisect_left(range(NEEDED), True, lo=2, key=lambda n: half_width(found.deviation, n, alpha) < width)


# Questions


class Candidate(Struct):
    """An experiment that is compared. Its seed is chosen later."""

    label: Annotated[str, Meta(max_length=1000, pattern=rf"\A[^{UNSHOWN}|<>`]+\Z")]
    name: Name
    spec: Spec

    def __post_init__(self) -> None:
        self.spec = {**resolve(self.spec), "seed": 0}


class Question(Struct, kw_only=True):
    """Which of the candidates has the best validation accuracy?

    Attributes:
        within: points; a smaller difference does not matter.
        confidence: percent, of all pairs together.
        first_seed: the seeds are this one and the next `max_seeds` - 1.
        data: the identity of the data; see core.data.identity.

    Raises:
        QuestionError: it has no answer.
    """

    candidates: list[Candidate]
    within: float = DIFFERENCE
    max_seeds: int = 50
    confidence: float = 95.0
    first_seed: Annotated[int, Meta(ge=0)] = 0
    data: Text = ""

    def __post_init__(self) -> None:
        labels = [candidate.label for candidate in self.candidates]
        if not 2 <= len(labels) <= MAX_CANDIDATES:
            raise QuestionError(f"found {len(labels)} candidates, expected 2 to {MAX_CANDIDATES}")
        seen: dict[str, str] = {}
        for candidate in self.candidates:
            if candidate.spec["train_on"] == "all":
                raise QuestionError(f"{candidate.label} trains on all images: it has no validation accuracy")
            if other := seen.get(canonical(candidate.spec)):
                raise QuestionError(f"{other} and {candidate.label} are the same experiment, expected two that differ")
            seen[canonical(candidate.spec)] = candidate.label
        if len({candidate.spec["dataset"] for candidate in self.candidates}) > 1 or len(set(labels)) < len(labels):
            raise QuestionError(f"{', '.join(labels)} cannot be compared: expected one data set, and a name for each")
        if not 0 < self.within <= 100:
            raise QuestionError(f"--within {self.within:g}, expected points of accuracy above 0")
        if not 50 <= self.confidence < 100:
            raise QuestionError(f"--confidence {self.confidence:g}, expected percent, at least 50 and below 100")
        least = first_look(self.alpha)
        if not least <= self.max_seeds <= MAX_SEEDS:
            raise QuestionError(
                f"--max-seeds {self.max_seeds}, expected {least} to {MAX_SEEDS:,}: {len(labels)} candidates need at "
                f"least {least} seeds at {self.confidence:g}%"
            )

    @property
    def alpha(self) -> float:
        """The error probability of each pair: all pairs share that of the question."""
        return (1 - self.confidence / 100) / math.comb(len(self.candidates), 2)

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.max_seeds)

    @property
    def file(self) -> str:
        """Its file under the folder of the report. No experiment has a folder with such an ending."""
        about = sorted((each.name, spec_id(each.spec)) for each in self.candidates), self.first_seed
        return f"checkpoints/compare-{hashlib.sha256(canonical(about).encode()).hexdigest()[:12]}.json"

    @property
    def picture(self) -> str:
        return self.file.removesuffix("json") + "svg"

    def write(self, out: Path) -> None:
        """Write its file, in the place of the same question with other limits.

        Raises:
            StoreError: it cannot be written, or there is a file that is no question.
        """
        layout.write(out / self.file, self, WHAT)


def read_all(out: Path, former: Mapping[str, str] = {}) -> list[Question]:
    """The questions that were asked under `out`. Skips a file that is none, with a warning in the log.

    Args:
        former: old names of experiments, with the new names.
    """
    questions: dict[str, Question] = {}
    for question in layout.read_all((out / "checkpoints").glob("compare-*.json"), Question, WHAT):
        for candidate in question.candidates:
            candidate.name = new_name(candidate.name, former)
        questions[question.file] = question
    return sorted(questions.values(), key=lambda question: [candidate.label for candidate in question.candidates])


# Answers


Known = Mapping[str, Mapping[int, Record]]  # records by the label of their candidate and their seed


def assign(question: Question, records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """The records that answer a question: finished runs and those that diverged."""
    labels = {(each.name, canonical(each.spec)): each.label for each in question.candidates}
    known: dict[str, dict[int, Record]] = {candidate.label: {} for candidate in question.candidates}
    for record in records:
        label = labels.get((record.name, canonical({**record.spec, "seed": 0})))
        if label and record.seed in question.seeds and (isinstance(record, Finished) or diverged(record)):
            known[label][record.seed] = record
    return known


def diverged(record: Record) -> bool:
    return isinstance(record, Failed) and record.diverged


def accuracy(record: Record) -> float:
    """The validation accuracy; that of a guess if the run diverged."""
    if not isinstance(record, Finished):
        return 1 / len(record.data_info.classes)
    assert record.metrics.validation is not None  # a question has no candidate that trains on all images
    return record.metrics.validation.accuracy


class Pair(NamedTuple):
    """Two candidates. `better` has the higher mean over the seeds of both."""

    better: str
    worse: str
    difference: Interval


def pair(question: Question, known: Known, a: str, b: str, most: int = MAX_SEEDS) -> Pair:
    """Compare two candidates over the first `most` seeds that both have."""
    seeds = sorted(known[a].keys() & known[b].keys())[:most]
    values = [100 * (accuracy(known[a][seed]) - accuracy(known[b][seed])) for seed in seeds]
    # Few seeds can have equal differences by chance: less than one image is never significant.
    images = [r.metrics.validation.n for r in known[a].values() if isinstance(r, Finished) and r.metrics.validation]
    least = 100 / images[0] if images else 0.0
    if sum(values) < 0:
        return Pair(b, a, interval([-value for value in values], question.alpha, least))
    return Pair(a, b, interval(values, question.alpha, least))


class Look(NamedTuple):
    """What the records say of a question.

    Attributes:
        pairs: each two candidates.
        left: the candidates that no other one beats, the best first.
        answer: "winner" (one is left), "within" (those that are left differ by less than `within`), "undecided" (all
            seeds are used up), or "" (more seeds are needed).
        diverged: how many runs of a candidate diverged, if any.
    """

    pairs: list[Pair]
    left: list[str]
    answer: str
    diverged: dict[str, int]

    @property
    def open(self) -> list[Pair]:
        """The pairs of those that are left."""
        return [pair for pair in self.pairs if {pair.better, pair.worse} <= set(self.left)]

    @property
    def beaten(self) -> list[Pair]:
        """A pair for each candidate that is beaten; if there is one, that with the best candidate."""
        significant = sorted(
            (p for p in self.pairs if p.difference.significant), key=lambda p: p.better == self.left[0]
        )
        return sorted({pair.worse: pair for pair in significant}.values(), key=lambda pair: pair.difference.mean)

    @property
    def decided(self) -> Pair | None:
        """The pair that the answer is about: the best two, or the winner and the closest that it beats."""
        if self.answer == "winner":
            return min(self.beaten, key=lambda p: (p.better != self.left[0], p.difference.mean))
        first = set(self.left[:2])
        return next(p for p in self.open if {p.better, p.worse} == first) if self.answer == "within" else None


def look(question: Question, known: Known) -> Look:
    labels = [candidate.label for candidate in question.candidates]
    pairs = [pair(question, known, a, b) for a, b in combinations(labels, 2)]
    beaten = {pair.worse for pair in pairs if pair.difference.significant}
    left = [label for label in labels if label not in beaten] or labels
    common = set.intersection(*(set(known[label]) for label in left))
    if common:
        left.sort(key=lambda label: -fmean(accuracy(known[label][seed]) for seed in common))
    failed = {label: sum(map(diverged, known[label].values())) for label in labels}
    found = Look(pairs, left, "", {label: count for label, count in failed.items() if count})
    if len(left) == 1:
        return found._replace(answer="winner")
    if all(pair.difference.mean + pair.difference.half < question.within for pair in found.open):
        return found._replace(answer="within")
    used_up = all(pair.difference.n >= question.max_seeds for pair in found.open)
    return found._replace(answer="undecided" if used_up else "")


Train = Callable[[list[tuple[Candidate, int]]], Iterable[Record] | None]


def missing(question: Question, known: Known, left: Iterable[str], count: int) -> list[tuple[Candidate, int]]:
    """The runs among the first `count` seeds of the candidates `left` that are not known yet."""
    candidates = [candidate for candidate in question.candidates if candidate.label in left]
    return [(each, seed) for seed in question.seeds[:count] for each in candidates if seed not in known[each.label]]


def first_count(question: Question, known: Known) -> int:
    """The seeds of the first round: as many as an interval needs, or as all candidates have already."""
    have = next((i for i, seed in enumerate(question.seeds) if any(seed not in each for each in known.values())), None)
    return max(first_look(question.alpha), question.max_seeds if have is None else have)


def rounds(question: Question, records: Iterable[Record], train: Train) -> Iterator[Look]:
    """Ask for runs in growing rounds until the answer is clear, and yield a look after each round.

    Args:
        records: those that exist already, of this code and data.
        train: called with the runs that a round needs. Returns their records, or None after a stop, which ends the
            rounds. A run that has no record is asked for again in the next round.

    Yields:
        Looks. The last one has an answer, unless there was a stop or a run has no record.
    """
    known = assign(question, records)
    count, left = first_count(question, known), [candidate.label for candidate in question.candidates]
    found = None
    while True:
        if todo := missing(question, known, left, count):
            made = train(todo)
            if made is None:
                return
            for label, by_seed in assign(question, made).items():
                known[label] |= by_seed
        before, found = found, look(question, known)
        if found != before:  # the runs of a round may exist already
            yield found
        if found.answer or count == question.max_seeds:
            return
        count, left = min(question.max_seeds, count + max(1, count // GROWTH)), found.left
