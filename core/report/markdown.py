"""The text of results.md, from the records."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import fmean, median_high

from core.code_hash import same_numbers
from core.data import cifar10
from core.report import best_run, comparisons, plots, published, stats, tables, text
from core.report.catalog import Catalog
from core.report.stats import Group
from core.runs.record import Finished, Record
from core.spec import Spec, SpecError, resolve

# Tables

Column = tuple[str, Callable[[Group], str]]  # the heading, and the cell of a group


def _spread(group: Group, split: str) -> str:
    return stats.spread(stats.accuracies(group, split))


def _range(group: Group, split: str) -> str:
    low, high = stats.mean_interval(group, split)
    return f"({100 * low:.2f}–{100 * high:.2f})"


NUMBERS: list[Column] = [
    ("gap", lambda g: f"{stats.gap(g):.1f}"),
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


def _table(columns: list[Column], groups: Iterable[Group]) -> str:
    return text.grid([heading for heading, _ in columns], ([cell(group) for _, cell in columns] for group in groups))


# How to run it again

OPTIONS = {"epochs": "--epochs", "batch_size": "--batch-size", "lr": "--lr", "precision": "--precision"}


def _resolved(spec: Spec) -> Spec:
    """The whole spec; nothing where it cannot be run."""
    try:
        return resolve(spec)
    except SpecError:
        return {}


def _commands(groups: list[Group], catalog: Catalog, force: str = "") -> list[str]:
    """What trains these runs again; experiments that take the same options share a line. `force` ends each line."""
    known = {name: spec for suite in catalog.suites.values() for name, spec in suite.items()}
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
    commands = [f"uv run main.py run {' '.join(those)}{options}{force}" for options, those in names.items()]
    return text.first(commands + gone, "# and {} more", text.ROWS - 1)


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


# Sections


def _best(best: Group, pictures: Mapping[str, plots.Picture]) -> Iterator[str]:
    """The pictures of the best experiment, each with its numbers."""
    shown = [path for path in (best_run.CONFUSION, best_run.MISTAKES, best_run.FILTERS) if path in pictures]
    if not shown:
        return
    yield f"\n## The best experiment by validation: {best.label}\n"
    for path in shown:
        yield f"\n{_picture(pictures[path])}{pictures[path].table}"


def _picture(picture: plots.Picture) -> str:
    """The line that shows a picture, with its alternative text."""
    return f"![{picture.alt}]({picture.path})\n"


def _records(groups: list[Group], pictures: Mapping[str, plots.Picture]) -> str:
    """The runs that were trained on all images, beside what is published."""
    if not groups:
        return ""
    picture = pictures.get(published.PICTURE)
    return (
        "\n## Records\n\nTrained on all 50,000 images, as the published networks are: these runs have no validation "
        "accuracy and take part in no choice. Means over n seeds ± the standard deviation of one. Training is the time "
        "of all steps. With compilation, the longest time to a first step among the runs is added: for whitening and "
        "compilation, or for whitening alone where the step had been compiled before. PetaFLOP are 6 operations a "
        "parameter and example, and the whitening of each image.\n\n"
        + text.grid(
            published.RUNS, ([cell(group) for cell in published.RUNS.values()] for group in groups[: text.ROWS])
        )
        + f"\n{len(groups) - text.ROWS:,} more are left out.\n" * (len(groups) > text.ROWS)
        + "\nPublished results without convolution; no time is known for any of them:\n\n"
        + text.grid(published.PAPERS, ([cell(p) for cell in published.PAPERS.values()] for p in published.PUBLISHED))
        + (f"\n{_picture(picture)}" if picture else "")
    )


def _apart(results: stats.Results, catalog: Catalog) -> str:
    """The runs of other code or on other data, and how to train them anew."""
    if not results.other:
        return ""

    def code(group: Group) -> str:
        return "this" if same_numbers(group[0].environment.code) else group[0].environment.code or "unknown"

    columns: list[Column] = [
        ("experiment", lambda g: g.label),
        ("n", lambda g: f"{len(g):,}"),
        ("validation", lambda g: _spread(g, "validation") if g[0].metrics.validation else "none"),
        ("test", lambda g: _spread(g, "test")),
        ("epochs", lambda g: str(g[0].spec["epochs"])),
        ("code", code),
        ("data", lambda g: "this" if g[0].data == results.data else g[0].data[:12]),
    ]
    left_out = len(results.other) - text.ROWS
    commands = "\n".join(_commands(results.other, catalog, " --force"))
    return (
        f"\n## {APART}\n\nOther code or other data can give other numbers. These runs are therefore in no other table, "
        "mean, choice, comparison or picture of this report. A row is an experiment, with one code and one data set. "
        f"In [results.csv]({tables.RESULTS_CSV}), the column `current` of these runs is False.\n\n"
        + _table(columns, results.other[: text.ROWS])
        + (f"\n{left_out:,} more are left out.\n" if left_out > 0 else "")
        + f"\nThese commands train them anew, with this code and on CIFAR-10:\n\n```sh\n{commands}\n```\n"
    )


# The whole

APART = "Runs of other code or other data"
HEADER = "# Results\n\nWritten by `main.py` from the records in `checkpoints/`; do not edit."


def _introduction(results: stats.Results) -> str:
    images = "45,000 train, 5,000 validation and 10,000 test"
    if results.compared:
        splits = results.compared[0][0].metrics
        n = [split.n for split in (splits.train, splits.validation, splits.test) if split]
        images = f"{n[0]:,} train, {n[1]:,} validation and {n[2]:,} test"
    other = "" if results.data == cifar10.DIRECTORY_HASH else f" The data are not CIFAR-10: {results.data[:12]}."
    return (
        f"{HEADER} Accuracies are measured in evaluation mode on all {images} images; the test split is read once, at "
        f"the end of a run. Every choice below is made by validation.{other}\n\n"
    )


def _legend(groups: list[Group], catalog: Catalog) -> str:
    """How the table is read, as a list."""
    lines = ["A row is an experiment, the best by validation first. Its n runs differ in the seed alone."]
    if catalog.ablations:
        lines.append(
            "The name of a variant has a minus before what is left out and a plus before what is added: "
            "`full-dropout` has no dropout, `minute+dropout` has dropout."
        )
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
    lines.append(f"Every run, with its whole spec, is a row of [results.csv]({tables.RESULTS_CSV}).")
    return "\n" + "".join(f"- {line}\n" for line in lines)


def markdown(
    records: list[Record],
    catalog: Catalog,
    pictures: Mapping[str, plots.Picture] = {},
    group_by: str | None = None,
) -> str:
    """The text of results.md.

    Args:
        records: sorted by core.report.stats.order. pictures: by path, those that are on disk. Others as
            core.report.rebuild.rebuild has them.
    """
    results = stats.results(records)
    groups = stats.ranked(results.compared)
    finished = [record for group in groups for record in group]
    recipes = sorted(results.trained_on_all, key=lambda group: published.work(group[0]))
    best = groups[: text.ROWS]
    parts = [_introduction(results), _table(COLUMNS, best)]
    if len(best) < len(groups):
        left = len(finished) - sum(map(len, best))
        parts.append(
            f"\n{len(groups) - len(best):,} of {len(groups):,} experiments, with {left:,} of {len(finished):,} "
            "finished runs, are left out.\n"
        )
    parts.append(_legend(best, catalog))
    if results.other:
        count = sum(map(len, results.other))
        anchor = APART.lower().replace(" ", "-")
        parts.append(
            f"\n{count:,} finished {'run is' if count == 1 else 'runs are'} of other code or on other data, and not in "
            f"this table: see [{APART}](#{anchor}).\n"
        )
    failures = [
        f"\n{r.name}, seed {r.seed}, failed{'' if results.has(r) else ' (other code or data)'}: {r.error}.\n"
        for r in records
        if not isinstance(r, Finished)
    ]
    parts += text.first(failures, "\n{} more runs failed.\n")
    inexact = [
        f"\n{r.name}, seed {r.seed}, is not bitwise: it went on from a resume point where its bits are not those of "
        "an uninterrupted run (--resume-anyway, or in another cohort).\n"
        for r in records
        if isinstance(r, Finished) and not r.bitwise
    ]
    parts += text.first(inexact, "\n{} more runs were resumed in this way.\n")
    if group_by:
        values = stats.grouped_by(finished, group_by)
        parts.append(
            f"\n## By {group_by}\n\nMeans ± standard deviations over all runs with this value, which may differ in "
            "other keys too.\n\n"
        )
        parts.append(_table(_by_value(group_by), values[: text.ROWS]))
        parts.append(f"\n{len(values) - text.ROWS:,} more values are left out.\n" * (len(values) > text.ROWS))
    if choices := comparisons.choices(groups):
        parts += ["\n## Choice of the learning rate\n\n", "\n".join(choices)]
    parts += [comparisons.changes(groups, catalog), comparisons.bought(groups), _records(recipes, pictures)]
    compared = [pictures[path] for path in map(plots.suite_path, catalog.suites) if path in pictures]
    if compared:
        parts.append("\n## The suites\n")
        parts += [f"\n{_picture(picture)}" for picture in compared]
    if groups:
        parts += _best(groups[0], pictures)
    if groups or recipes:
        points = tables.curve_points(len(groups) + len(recipes))
        parts.append("\n## Learning curves\n\n")
        parts += [f"{_picture(pictures[path])}\n" for path in (plots.CURVES,) if path in pictures]
        parts.append(
            f"The curves of every experiment are in [learning-curves.csv]({tables.CURVES_CSV}): at most {points} "
            "epochs of each, evenly spaced, the first and the last included. Its column `epochs` says how many there "
            "were.\n"
        )
    parts.append(_apart(results, catalog))
    if groups or recipes:
        places = text.first(sorted({_place(r) for group in groups + recipes for r in group}), "- and {} more")
        commands = "\n".join([*_commands(best + recipes[: text.ROWS], catalog), "uv run main.py evaluate"])
        parts.append(f"\n## Reproduce\n\n```sh\n{commands}\n```\n\nMade on:\n\n" + "\n".join(places) + "\n")
    return "".join(parts)
