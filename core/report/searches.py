"""What the records say of the searches that were made: a sentence, a section of results.md, a picture."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from core import compare, space
from core.report import plots, stats, text
from core.report.plots import Picture
from core.report.questions import Asked
from core.runs.record import Failed, Finished, Partial, Record
from core.space import Trials, accuracy
from core.spec import Spec, changed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 10  # trials of a table
CATEGORIES = 8  # different values of a key that are drawn side by side; more are drawn on an axis of numbers


class Searched(NamedTuple):
    """A search, the records of its trials by their numbers from 1 on, and the comparison of the best ones."""

    trials: Trials
    records: dict[int, Record]
    asked: Asked | None

    @property
    def finished(self) -> dict[int, Finished]:
        """The trials with a result, the best first."""
        found = {number: record for number, record in self.records.items() if isinstance(record, Finished)}
        return dict(sorted(found.items(), key=lambda each: -accuracy(each[1])))

    @property
    def winner(self) -> int | None:
        """The number of the trial that is best on fresh seeds.

        If the base beats all trials that were compared: of these, the one that was best in the search. If none was
        compared: the best one of the search.
        """
        best = next(iter(self.finished), None)
        if self.asked is None:
            return best
        asked = {candidate.label for candidate in self.asked.question.candidates}
        numbers = {name: n for n in self.finished if (name := label(self.trials.name, n)) in asked}
        left = [numbers[each] for each in self.asked.look.left if each in numbers]
        return next(iter([*left, *numbers.values()]), best)

    @property
    def base(self) -> str:
        """The base as a candidate of the comparison; empty without a comparison."""
        candidates = self.asked.question.candidates if self.asked else []
        return next((each.label for each in candidates if each.name != self.trials.name), "")

    @property
    def against_base(self) -> compare.Pair | None:
        """The winner and the base on fresh seeds; None if they have no such seed."""
        if self.asked is None or self.winner is None:
            return None
        question, known, _ = self.asked
        mine = label(self.trials.name, self.winner)
        pair = compare.pair(question, known, mine, self.base) if mine in known else None
        return pair if pair and pair.difference.n else None

    @property
    def is_beaten(self) -> bool:
        """Whether the base is significantly better than the winner on fresh seeds."""
        pair = self.against_base
        return pair is not None and pair.difference.significant and pair.better == self.base


def searched(out: Path, records: Sequence[Record], asked: Iterable[Asked]) -> list[Searched]:
    """The searches under `out`, with their records."""
    by_file, found = {each.question.file: each for each in asked}, []
    for trials in space.read_all(out):
        by_id: dict[str, Record] = {}
        for record in records:  # a trial may be answered by a record of another name
            if record.spec_id not in by_id or record.name == trials.name:
                by_id[record.spec_id] = record
        members = {number: by_id[i] for number, i in enumerate(trials.trials, 1) if i in by_id}
        found.append(Searched(trials, members, by_file.get(trials.comparison)))
    return found


def other(records: Sequence[Record], searches: Iterable[Searched]) -> list[Record]:
    """The records that are of no search. A trial is chosen among many, so it is in no other table."""
    names = {each.trials.name for each in searches}
    return [record for record in records if record.name not in names]


def label(name: str, number: int) -> str:
    """A trial as a candidate of a comparison."""
    return f"{name} trial {number}"


def pasted(spec: Spec) -> str:
    """A spec as the dict to paste into experiments/: the keys that differ from their defaults, without the seed."""
    return str({key: value for key, value in changed(spec).items() if key != "seed"})


def sentence(search: Searched) -> str:
    """How good is the best trial, and how good is it on fresh seeds? Empty without a finished trial."""
    number, pair = search.winner, search.against_base
    if number is None:
        return ""
    rank = list(search.finished).index(number)
    which = "best trial" if rank == 0 else f"trial {number}, number {rank + 1} of the search,"
    found = f"{which} {100 * accuracy(search.finished[number]):.1f}% on validation"
    found += f" (chosen among {len(search.trials.trials)})"
    if search.asked is None or pair is None:
        return f"{found}; not compared on fresh seeds yet"
    question, known, _ = search.asked
    mine, base = label(search.trials.name, number), search.base
    seeds = sorted(known[mine].keys() & known[base].keys())
    fresh = 100 * fmean(compare.accuracy(known[mine][seed]) for seed in seeds)
    if pair.difference.significant:
        verdict = "beats" if pair.better == mine else "is beaten by"
        against = f"{verdict} {base} by {pair.difference}"
    elif pair.difference.mean + pair.difference.half < question.within:
        against = f"differs from {base} by less than {question.within:g} points ({pair.difference})"
    else:
        against = f"cannot be told apart from {base} ({pair.difference})"
    return f"{found}; with {len(seeds)} fresh seeds {fresh:.1f}%; {against}"


# The report


def section(searches: Sequence[Searched], shown: Mapping[str, str]) -> str:
    """What was searched, and what was found?

    Args:
        shown: the pictures that are on disk, as Markdown, by path.
    """
    parts = []
    for search in searches:
        if (best := search.winner) is None:
            continue
        trials, finished = search.trials, search.finished
        behind = sum(isinstance(record, Partial) for record in search.records.values())
        failed = sum(isinstance(record, Failed) for record in search.records.values())
        rows = [
            [str(number), stats.percent(accuracy(record)), *(stats.shown(record.spec[key]) for key in trials.keys)]
            for number, record in list(finished.items())[:TOP]
        ]
        spec = pasted(finished[best].spec)
        paste = f"The spec of trial {best}, to paste into `experiments/`:\n\n```python\n{spec}\n```\n"
        parts.append(
            f"### {trials.name}\n\n**{sentence(search)}.** Of {len(trials.trials)} trials, {behind} fell behind and "
            f"stopped early, and {failed} failed. The best by validation:\n\n"
            f"{text.grid(('trial', 'validation', *trials.keys), rows)}{shown.get(picture_path(trials), '')}\n"
            f"{'' if search.is_beaten else paste}"
        )
    if not parts:
        return ""
    return (
        "## Searches\n\nEach trial is one run with one seed. The best of many trials is lucky, so `main.py search` "
        "compares the three best with the base on seeds that no trial had. Trials are in no other table.\n\n"
        + "\n".join(parts)
    )


def picture_path(trials: Trials) -> str:
    return trials.file.removesuffix("json") + "svg"


def pictures(searches: Iterable[Searched]) -> Iterator[Picture]:
    """Validation against each searched key, and the best so far against the trials."""
    for search in searches:
        if not search.finished:
            continue
        trials = search.trials
        points = [
            (number, 100 * accuracy(record), isinstance(record, Finished), [record.spec[key] for key in trials.keys])
            for number, record in search.records.items()
            if isinstance(record, Finished | Partial)
        ]
        title = f"{plots.short(trials.name)}: validation accuracy (%)\ndots: whole trials, crosses: stopped early"
        alt = f"Validation accuracy against each searched key, and the best so far. {sentence(search)}"
        height = 1.2 + 2.3 * ((len(trials.keys) + 2) // 2)
        yield Picture(picture_path(trials), title, (trials.keys, trials.log, points), _paint, height, alt)


Point = tuple[int, float, bool, list[Any]]  # number of the trial, validation, whether it is whole, values of the keys


def _paint(figure: "Figure", content: tuple[list[str], list[str], list[Point]], _: Any) -> None:
    keys, log, points = content
    axes = figure.subplots((len(keys) + 2) // 2, 2, squeeze=False, sharey=True).ravel()
    best, whole = list[float](), [point for point in points if point[2]]
    for _, value, *_ in whole:
        best.append(max(value, best[-1] if best else value))
    axes[0].step([number for number, *_ in whole], best, where="post", linewidth=2)
    columns = [("trial", [number for number, *_ in points])]
    columns += [(key, [values[i] for *_, values in points]) for i, key in enumerate(keys)]
    for ax, (name, values) in zip(axes, columns, strict=False):
        names = [stats.shown(value) for value in values]
        order = sorted(dict(zip(names, values, strict=True)).items(), key=lambda each: each[1])
        places: Sequence[float] = values
        if name != "trial" and (len(order) <= CATEGORIES or not isinstance(values[0], int | float)):
            labels = [shown for shown, _ in order]
            places = [labels.index(shown) for shown in names]
            ax.set_xticks(range(len(labels)), labels, rotation=45 if max(map(len, labels)) > 5 else 0, fontsize=9)
        elif name in log:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
        for is_whole, marker, color in ((False, "x", "grey"), (True, "o", "C0")):
            at = [i for i, point in enumerate(points) if point[2] == is_whole]
            heights = [points[i][1] for i in at]
            ax.scatter([places[i] for i in at], heights, marker=marker, color=color, s=18, alpha=0.7)
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    for ax in axes[len(columns) :]:
        ax.set_visible(False)
