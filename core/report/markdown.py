"""The text of results.md, from the records."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import fmean, median_high
from typing import NamedTuple

from core.report import plots, published, sheet, stats
from core.report.stats import Group
from core.runs.record import Finished, Record
from core.spec import FIELDS, Spec, SpecError, canonical, resolve

Suites = Mapping[str, Mapping[str, Spec]]

ROWS = 30  # of a table, at most
LINES = 10  # of a list, at most
SETS = 5  # of experiments that are compared, at most
VERDICTS = {"paid": "Paid", "cost": "Cost accuracy", "cannot be told": "Cannot be told apart from chance"}
ABLATION, BASELINE = "ablation", "baseline"  # suites, and the experiment that the full network is compared with


def order(record: Record) -> tuple:
    """Sorts the records: by network, deeper first, so a baseline stands below the runs it is compared with; then by
    learning rate."""
    spec = record.spec
    return -len(spec["widths"]), spec["widths"], spec["norm"], -spec["lr"], record.name, spec["seed"]


# Tables

Column = tuple[str, Callable[[Group], str]]  # the heading, and the cell of a group


def _spread(group: Group, split: str) -> str:
    return stats.spread(stats.accuracies(group, split))


def _range(group: Group, split: str) -> str:
    low, high = stats.mean_interval(group, split)
    return f"({100 * low:.2f}–{100 * high:.2f})"


NUMBERS: list[Column] = [
    ("gap", lambda g: f"{100 * (stats.accuracy(g, 'train') - stats.accuracy(g, 'test')):.1f}"),
    ("time", lambda g: f"{fmean(map(stats.seconds, g)):.0f} s"),
    ("samples/s", lambda g: f"{median_high(map(stats.speed, g)):,}"),
]
COLUMNS: list[Column] = [
    ("experiment", lambda g: g.label),
    ("n", lambda g: f"{len(g):,}"),
    ("validation", lambda g: f"{_spread(g, 'validation')} {_range(g, 'validation')}"),
    ("test", lambda g: f"**{_spread(g, 'test')}** {_range(g, 'test')}"),
    ("train", lambda g: _spread(g, "train")),
    *NUMBERS,
    ("lr", lambda g: stats.shown(g[0].spec["lr"])),
    ("parameters", lambda g: f"{g[0].parameters:,}"),
    ("epochs", lambda g: str(g[0].spec["epochs"])),
    ("precision", lambda g: g[0].spec["precision"]),
]


def _by_value(key: str) -> list[Column]:
    """The columns of a table by a key of the spec."""
    splits = [(split, lambda g, split=split: _spread(g, split)) for split in ("validation", "test", "train")]
    experiments: Column = ("experiments", lambda g: f"{len({r.name for r in g}):,}")
    return [(key, lambda g: g.label), ("n", lambda g: f"{len(g):,}"), experiments, *splits, *NUMBERS]


def _grid(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _table(columns: list[Column], groups: Iterable[Group]) -> str:
    return _grid([heading for heading, _ in columns], ([cell(group) for _, cell in columns] for group in groups))


def _first(lines: list[str], rest: str, most: int = LINES) -> list[str]:
    """At most `most` lines: where there are more, the last says how many are left out."""
    return lines if len(lines) <= most else [*lines[: most - 1], rest.format(f"{len(lines) - most + 1:,}")]


def _and(names: list[str]) -> str:
    names = _first(names, "{} others")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds(n: int) -> str:
    return f"{n:,} seed{'s' * (n != 1)}"


# Comparisons


def _points(difference: stats.Difference) -> str:
    return f"{100 * difference.mean:+.2f} ± {100 * difference.half:.2f}"


def _compared(a: str, b: str, difference: stats.Difference, more: bool = False) -> str:
    """The sentence for a comparison, without its full stop; with `more`, also what it takes to tell two apart."""
    if difference.mean < 0:
        a, b, difference = b, a, difference._replace(mean=-difference.mean)
    how = f"{_seeds(difference.seeds)}, paired" if difference.paired else "sampling error"
    points = f"{100 * difference.mean:.2f} ± {100 * difference.half:.2f} points ({how})"
    if difference.told:
        return f"{a} beats {b} by {points}"
    return f"{a} and {b} cannot be told apart: {points}{_more_seeds(difference) * more}"


def _more_seeds(difference: stats.Difference) -> str:
    """What it takes to find a difference that is worth finding."""
    if not difference.paired:
        return ""
    more = stats.needed(difference.deviation) - difference.seeds
    worth = f"a difference of {100 * stats.DIFFERENCE:g} points"
    if more <= 0:
        return f"; {worth} would most likely have been seen"
    return f"; about {more:,} more seed{'s' * (more > 1)} would be needed to see {worth}"


UNPAIRED = (
    "Fewer than two seeds of both cannot be paired: there the range is the sampling error of two accuracies as if each "
    "had been measured on other images. `--seeds 5` tells more."
)


def _images(a: Group, b: Group) -> str:
    """The sentence for a comparison image by image; nothing where the records do not say which images were right."""
    found = stats.image_by_image(a, b)
    if found is None:
        return ""
    p = "p < 0.0001" if found.p < 1e-4 else f"p = {found.p:.2g}"
    return (
        f" Image by image, {a.label} alone is right on {found.first:,} of {found.n:,} and {b.label} alone on "
        f"{found.second:,} (the networks of seed {found.seed}; exact McNemar test: {p})."
    )


def _choices(groups: list[Group]) -> list[str]:
    """What is to be said of each set of groups that differ in the learning rate alone, the best set first."""
    sets: dict[str, dict[float, Group]] = defaultdict(dict)
    for group in groups:
        spec = group[0].spec
        # One spec may have run under two names.
        sets[canonical({**spec, "seed": 0, "lr": 0})].setdefault(spec["lr"], group)
    rivals = sorted(
        (stats.ranked(found.values()) for found in sets.values() if len(found) > 1),
        key=lambda ranking: -stats.accuracy(ranking[0], "validation"),
    )
    return _first(
        [_choice(ranking) for ranking in rivals], "The same was asked of {} more sets of learning rates.\n", SETS
    )


def _choice(ranking: list[Group]) -> str:
    best, others = ranking[0], ranking[1:]
    shown = others[:LINES]
    validation = [stats.compare(best, other, "validation") for other in shown]
    ahead = [found.told and found.mean > 0 for found in validation]
    close = [other.label for other, is_behind in zip(shown, ahead, strict=True) if not is_behind]
    if close:
        sure = f"It is not sure: {_and(close)} may be as good."
    else:
        sure = "It beats all the others." if len(others) == len(shown) else f"It beats the next {len(shown)}."
    names = [group.label for group in sorted(ranking, key=lambda group: order(group[0]))]
    sentences = [f"- {_compared(best.label, o.label, d, more=True)}." for o, d in zip(shown, validation, strict=True)]
    on_test = [
        f"- {_compared(best.label, other.label, stats.compare(best, other, 'test'))}.{_images(best, other)}"
        for other in shown
    ]
    return (
        "\n".join(
            [
                f"Of {_and(names)}, which differ in the learning rate alone, the mean validation accuracy chooses "
                f"**{best.label}** ({stats.shown(best[0].spec['lr'])}): "
                f"{stats.percent(stats.accuracy(best, 'validation'))} over {_seeds(len(best))}. {sure}\n\n"
                "On validation:\n",
                *sentences,
                *[f"- {len(others) - len(shown):,} more are further behind."] * (len(others) > len(shown)),
                "\nOn test, which took no part in the choice, "
                f"{best.label} reaches {stats.percent(stats.accuracy(best, 'test'))}:\n",
                *on_test,
                *["\n" + UNPAIRED] * (not all(found.paired for found in validation)),
            ]
        )
        + "\n"
    )


def _one_change(a: Spec, b: Spec) -> str | None:
    """The key, but for the seed, in which two specs differ, if it is one."""
    keys = [key for key in a if key != "seed" and a[key] != b[key]]
    return keys[0] if len(keys) == 1 else None


def _verdict(worth: stats.Difference) -> str:
    if not (worth.told and worth.paired):  # one seed says nothing of others
        return "cannot be told"
    return "paid" if worth.mean > 0 else "cost"


class Worth(NamedTuple):
    """What one change is worth: the network that has it against the one that has not."""

    key: str
    added: bool  # to the reference, which has not got it; or removed from the reference, which has
    reference: Group
    member: Group

    @property
    def both(self) -> tuple[Group, Group]:
        """With the change, and without."""
        return (self.member, self.reference) if self.added else (self.reference, self.member)

    @property
    def how(self) -> str:
        """Where the comparison was made: with all else as in the baseline, or as in the full network."""
        return f"in {self.reference.label}"

    def points(self, split: str) -> stats.Difference:
        return stats.compare(*self.both, split)

    def row(self) -> list[str]:
        has, lacks = (stats.shown(group[0].spec[self.key]) for group in self.both)
        validation = self.points("validation")
        return [
            f"`{self.key}`: {has}, not {lacks}",
            self.how,
            _points(validation),
            _points(self.points("test")),
            str(validation.seeds),
            _verdict(validation),
        ]


def _worths(groups: list[Group], suites: Suites) -> list[Worth]:
    """The changes of the suites that are called ablation, or end so: what their experiments have other than the first,
    the plain network, or other than the last, which has it all."""
    worths = []
    for suite in (list(suites[name]) for name in suites if name.endswith(ABLATION) and suites[name]):
        references = [(g, g[0].name == suite[0]) for g in groups if g[0].name in (suite[0], suite[-1])]
        members = [g for g in groups if g[0].name in suite[1:-1]]
        pairs = [(r, m, _one_change(r[0].spec, m[0].spec), added) for r, added in references for m in members]
        worths += [Worth(key, added, r, m) for r, m, key, added in pairs if key]
    return sorted(worths, key=lambda worth: (list(FIELDS).index(worth.key), not worth.added))


def _what_paid(groups: list[Group], suites: Suites) -> str:
    """What each of these changes is worth, with a verdict by validation."""
    worths = _worths(groups, suites)
    if not worths:
        return ""
    verdicts: dict[str, dict[str, list[str]]] = {verdict: defaultdict(list) for verdict in VERDICTS}
    for worth in worths:
        verdicts[_verdict(worth.points("validation"))][worth.key].append(worth.how)
    lines = [
        f"- {VERDICTS[verdict]}: {_and([f'`{key}` ({_and(how)})' for key, how in keys.items()])}.\n"
        for verdict, keys in verdicts.items()
        if keys
    ]
    unpaired = f"\n{UNPAIRED}\n" * (not all(worth.points("validation").paired for worth in worths))
    return (
        "\n## What paid\n\nEach comparison is of two networks that differ in one thing: the accuracy with it less the "
        "accuracy without it, in points, with its 95% interval, paired over the seeds that both have. A change paid, "
        "or cost, where this interval on validation does not contain 0, over two seeds at least; test took no part in "
        "the verdict.\n\n"
        + "".join(lines)
        + "\n"
        + _grid(("change", "", "validation", "test", "seeds", "verdict"), [worth.row() for worth in worths[:ROWS]])
        + unpaired
    )


def _resolved(spec: Spec) -> Spec:
    """The whole spec; nothing where it cannot be run."""
    try:
        return resolve(spec)
    except SpecError:
        return {}


def _baseline(groups: list[Group]) -> str:
    """What the best network with batch norm has over the baseline, where there is one."""
    base = next((group for group in groups if group[0].name == BASELINE), None)
    if base is None:
        return ""
    spec = base[0].spec
    others = [g for g in groups if g[0].spec["norm"] == "batch" and g[0].spec["epochs"] == spec["epochs"]]
    if not others:
        return ""
    best = stats.ranked(others)[0]
    gap, base_gap = (100 * (stats.accuracy(g, "train") - stats.accuracy(g, "test")) for g in (best, base))
    return (
        "\n## What the network bought over the baseline\n\n"
        f"`baseline` has the hidden widths {spec['widths']} and {spec['activation']}, without batch norm or dropout. "
        f"Of the networks with batch norm, {best.label} is the best by validation. On test, "
        f"{_compared(best.label, base.label, stats.compare(best, base, 'test'))}: {best.label} reaches "
        f"{stats.percent(stats.accuracy(best, 'test'))}, {base.label} {stats.percent(stats.accuracy(base, 'test'))}, "
        f"and the gap between train and test goes from {base_gap:.1f} to {gap:.1f} points.{_images(best, base)}\n"
    )


def _records(groups: list[Group], pictures: Mapping[str, plots.Picture]) -> str:
    """The runs that were trained on all images, beside what is published."""
    if not groups:
        return ""
    picture = pictures.get(published.PICTURE)
    return (
        "\n## Records\n\nTrained on all 50,000 images, as the published networks are: these runs have no validation "
        "accuracy and take part in no choice. Means over n seeds ± the standard deviation of one. Training is the time "
        "of all steps; with compilation, that of the whitening and of the first step too, of the run that compiled it. "
        "PetaFLOP are 6 operations a parameter and example, and the whitening of each image.\n\n"
        + _grid(published.HEADINGS, map(published.row, groups[:ROWS]))
        + f"\n{len(groups) - ROWS:,} more are left out.\n" * (len(groups) > ROWS)
        + "\nPublished results without convolution; no time is known for any of them:\n\n"
        + _grid(("network", "test", "parameters", "epochs", "petaFLOP", "source"), published.rows())
        + (f"\n{_picture(picture)}" if picture else "")
    )


# How to run it again

OPTIONS = {"epochs": "--epochs", "batch_size": "--batch-size", "lr": "--lr", "precision": "--precision"}


def _commands(groups: list[Group], suites: Suites) -> list[str]:
    """What trains these runs again; experiments that take the same options share a line."""
    known = {name: spec for suite in suites.values() for name, spec in suite.items()}
    names: dict[str, list[str]] = defaultdict(list)
    gone = []
    for group in groups:
        name, spec = group[0].name, group[0].spec
        now = _resolved(known[name]) if name in known else {}
        changed = [key for key in spec if key != "seed" and spec[key] != now.get(key)]
        if set(changed) <= OPTIONS.keys():
            options = [f" {OPTIONS[key]} {spec[key]}" for key in changed]
            names["".join(options) + _seeds_option([r.seed for r in group], now["seed"])].append(name)
        else:
            gone.append(f"# {name} ({group[0].spec_id}): its spec is in its record, and in experiments/ no more")
    commands = [f"uv run main.py run {' '.join(those)}{options}" for options, those in names.items()]
    return [*_first(commands + gone, "# and {} more", ROWS - 1), "uv run main.py evaluate"]


def _seeds_option(seeds: list[int], now: int) -> str:
    if seeds == [now]:
        return ""
    if len(seeds) == 1:
        return f" --seed {seeds[0]}"
    return f" --seeds {len(seeds) if seeds == list(range(len(seeds))) else ','.join(map(str, seeds))}"


def _place(record: Finished) -> str:
    where = record.environment
    return (
        f"- {where.device_name} ({where.hardware}), {where.mode} on {where.device}, {where.threads} threads, torch "
        f"{where.torch}, Python {where.python}, commit {where.git}, data {record.data[:12]}"
    )


# Pictures


def _picture(picture: plots.Picture) -> str:
    return f"![{picture.alt}]({picture.path})\n"


def _folded(heading: str, table: str) -> str:
    return f"\n<details><summary>{heading}</summary>\n\n{table}\n</details>\n"


def _best(best: Group, pictures: Mapping[str, plots.Picture]) -> Iterator[str]:
    """The pictures of the best experiment, each with its numbers."""
    shown = [path for path in (plots.CONFUSION, plots.MISTAKES, plots.FILTERS) if path in pictures]
    if not shown:
        return
    yield f"\n## The best experiment by validation: {best.label}\n"
    for path in shown:
        picture = pictures[path]
        yield "\n" + _picture(picture)
        content = picture.content
        if isinstance(content, plots.Confusion):
            rows = plots.confusion_rows(content)
            yield _folded(
                "The numbers: of 100 images of a class (row), so many are taken for (column)",
                _grid(("", *content.classes), rows),
            )
        elif isinstance(content, plots.Mistakes):
            rows = [
                [str(m.index), content.classes[m.label], content.classes[m.predicted], f"{100 * m.probability:.4f}%"]
                for m in content.mistakes
            ]
            yield _folded("The numbers", _grid(("test image", "is", "taken for", "with probability"), rows))


# The whole

INTRODUCTION = (
    "# Results\n\nWritten by `main.py` from the records in `checkpoints/`; do not edit. Accuracies are measured in "
    "evaluation mode on all 45,000 train, 5,000 validation and 10,000 test images; the test split is read once, at the "
    "end of a run. Every choice below is made by validation.\n\n"
)


def _legend(groups: list[Group]) -> str:
    """How the table is read, as a list."""
    lines = ["A row is an experiment, the best by validation first. Its n runs differ in the seed alone."]
    if any(len(group) > 1 for group in groups):
        lines.append(
            "57.12 ± 0.31% (56.74–57.50): the mean over the seeds, the standard deviation of one seed, and the 95% "
            "interval of the mean (Student's t), which says how far other seeds would move it."
        )
    if any(len(group) == 1 for group in groups):
        lines.append(
            "Where n is 1, the interval is that of one accuracy measured on so many images (Wilson); it says nothing "
            "of other seeds."
        )
    lines.append("Every interval holds for itself: by chance alone, one comparison in twenty is wrong.")
    lines.append("The gap is train minus test, in points. The time is that of all steps of a run, without compilation.")
    lines.append(f"Every run, with its whole spec, is a row of [results.csv]({sheet.RUNS}).")
    return "\n" + "".join(f"- {line}\n" for line in lines)


def markdown(
    records: list[Record],
    suites: Suites,
    pictures: Mapping[str, plots.Picture] = {},
    group_by: str | None = None,
) -> str:
    """The text of results.md.

    Args:
        records: sorted by `order`. pictures: by path, those that are on disk. Others as core.report.rebuild.rebuild has
            them.
    """
    finished, whole = stats.by_validation(records)
    groups, recipes = stats.ranked(stats.groups(finished)), stats.groups(whole)
    best = groups[:ROWS]
    parts = [INTRODUCTION, _table(COLUMNS, best)]
    if len(best) < len(groups):
        left = len(finished) - sum(map(len, best))
        parts.append(
            f"\n{len(groups) - len(best):,} of {len(groups):,} experiments, with {left:,} of {len(finished):,} "
            "finished runs, are left out.\n"
        )
    parts.append(_legend(best))
    failures = [f"\n{r.name}, seed {r.seed}, failed: {r.error}.\n" for r in records if not isinstance(r, Finished)]
    parts += _first(failures, "\n{} more runs failed.\n")
    inexact = [
        f"\n{r.name}, seed {r.seed}, is not bitwise: it went on from a resume point where its bits are not those of "
        "an uninterrupted run (--resume-anyway, or in another cohort).\n"
        for r in finished + whole
        if not r.bitwise
    ]
    parts += _first(inexact, "\n{} more runs were resumed in this way.\n")
    if group_by:
        values = stats.grouped_by(finished, group_by)
        parts.append(
            f"\n## By {group_by}\n\nMeans ± standard deviations over all runs with this value, which may differ in "
            "other keys too.\n\n"
        )
        parts.append(_table(_by_value(group_by), values[:ROWS]))
        parts.append(f"\n{len(values) - ROWS:,} more values are left out.\n" * (len(values) > ROWS))
    if choices := _choices(groups):
        parts += ["\n## Choice of the learning rate\n\n", "\n".join(choices)]
    parts += [_what_paid(groups, suites), _baseline(groups), _records(recipes, pictures)]
    compared = [picture for picture in pictures.values() if isinstance(picture.content, plots.Intervals)]
    if compared:
        parts.append("\n## The suites\n")
        parts += [f"\n{_picture(picture)}" for picture in compared]
    if groups:
        parts += _best(groups[0], pictures)
    if plots.CURVES in pictures:
        parts.append(f"\n## Learning curves\n\n{_picture(pictures[plots.CURVES])}\n")
        parts.append(f"The numbers are in [learning-curves.csv]({plots.CURVES_TABLE}).\n")
    if finished or whole:
        places = _first(sorted({_place(r) for r in finished + whole}), "- and {} more")
        commands = "\n".join(_commands(best + recipes[:ROWS], suites))
        parts.append(f"\n## Reproduce\n\n```sh\n{commands}\n```\n\nMade on:\n\n" + "\n".join(places) + "\n")
    return "".join(parts)
