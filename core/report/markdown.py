"""The text of results.md, from the records."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, median_high, stdev
from typing import Any

from core.report import plots, stats
from core.runs.record import Finished, Record
from core.spec import Spec, SpecError, canonical, resolve

ROWS = 30  # of a table, at most; more runs than these are grouped
LINES = 10  # of a list, at most


def order(record: Record) -> tuple:
    """Sorts the rows: by network, deeper first, so a baseline stands below the runs it is compared with; then by
    learning rate."""
    spec = record.spec
    return -len(spec["widths"]), spec["widths"], spec["norm"], -spec["lr"], record.name, spec["seed"]


def _test(group: stats.Group) -> str:
    (record,) = group
    low, high = stats.interval(record.metrics.test.accuracy, record.metrics.test.n)
    return f"**{stats.spread(group, 'test')}** ({100 * low:.1f}–{100 * high:.1f})"


def _weights(group: stats.Group) -> str:
    return f"`{group[0].digest[:12]}`" + ("" if group[0].bitwise else " (not bitwise)")


Column = tuple[str, Callable[[Any], str]]  # the heading, and the cell of a group; a single run is a group of one

COLUMNS: list[Column] = [
    ("experiment", lambda g: g[0].name),
    ("lr", lambda g: f"{g[0].spec['lr']:g}"),
    ("seed", lambda g: str(g[0].seed)),
    ("seeds", lambda g: f"{len(g):,}"),
    ("parameters", lambda g: f"{g[0].parameters:,}"),
    ("epochs", lambda g: str(g[0].spec["epochs"])),
    ("batch", lambda g: str(g[0].spec["batch_size"])),
    ("train", lambda g: stats.spread(g, "train")),
    ("validation", lambda g: stats.spread(g, "validation")),
    ("test (95% interval)", _test),
    ("test", lambda g: f"**{stats.spread(g, 'test')}**"),
    ("gap", lambda g: f"{100 * (stats.accuracy(g, 'train') - stats.accuracy(g, 'test')):.1f}"),
    ("test loss", lambda g: f"{fmean(r.metrics.test.loss for r in g):.4f}"),
    ("time", lambda g: f"{fmean(map(stats.seconds, g)):.0f} s"),
    ("samples/s", lambda g: f"{median_high(map(stats.speed, g)):,}"),
    ("device", lambda g: f"{g[0].environment.device}, {g[0].environment.mode}"),
    ("weights", _weights),
]
RUN_COLUMNS = [column for column in COLUMNS if column[0] not in ("seeds", "test")]
GROUP_COLUMNS = [c for c in COLUMNS if c[0] not in ("seed", "test (95% interval)", "device", "weights")]
FAILED = ("experiment", "lr", "seed")  # the columns of a failed run: it claims no number

SEED_COLUMNS: list[Column] = [
    ("experiment", lambda g: g[0].name),
    ("seeds", lambda g: str(len(g))),
    ("mean test accuracy", lambda g: stats.percent(stats.accuracy(g, "test"))),
    ("standard deviation (points)", lambda g: f"{100 * stdev(stats.accuracies(g, 'test')):.2f}"),
]


def _table(columns: list[Column], groups: Iterable[list[Any]]) -> str:
    lines = [[heading for heading, _ in columns], ["---"] * len(columns)]
    for group in groups:
        finished = isinstance(group[0], Finished)
        lines.append([cell(group) if finished or heading in FAILED else "–" for heading, cell in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _first(lines: list[str], rest: str, most: int = LINES) -> list[str]:
    """At most `most` lines: where there are more, the last says how many are left out."""
    return lines if len(lines) <= most else [*lines[: most - 1], rest.format(f"{len(lines) - most + 1:,}")]


def _choices(groups: list[stats.Group]) -> list[str]:
    """A paragraph for each set of groups that differ in the learning rate alone, the best set first."""
    sets: dict[str, dict[float, stats.Group]] = defaultdict(dict)
    for group in groups:
        spec = group[0].spec
        # One spec may have run under two names.
        sets[canonical({**spec, "seed": 0, "lr": 0})].setdefault(spec["lr"], group)
    rivals = sorted(
        (stats.ranked(found.values()) for found in sets.values() if len(found) > 1),
        key=lambda ranking: -stats.accuracy(ranking[0], "validation"),
    )
    return _first([_choice(ranking) for ranking in rivals], "The same was asked of {} more sets of learning rates.\n")


def _choice(ranking: list[stats.Group]) -> str:
    best, second = ranking[:2]
    n = best[0].metrics.validation.n
    accuracies = [stats.accuracy(group, "validation") for group in (best, second)]
    # The error of a difference of two accuracies, as if measured independently; on the same images it is smaller. More
    # seeds do not make it smaller: they see the same images.
    error = 1.96 * math.sqrt(sum(a * (1 - a) / n for a in accuracies))
    lead = accuracies[0] - accuracies[1]
    verdict = "more than" if lead > error else "within"
    names = [group[0].name for group in sorted(ranking, key=lambda group: order(group[0]))]
    mean = "mean " if any(len(group) > 1 for group in ranking) else ""
    return (
        f"Of {', '.join(names) if len(names) <= LINES else f'{len(names):,} experiments'}, which differ in the "
        f"learning rate alone, the {mean}validation accuracy chooses **{best[0].name}** ({best[0].spec['lr']:g}): "
        f"{stats.percent(accuracies[0])}, {100 * lead:.2f} points before {second[0].name}, which is {verdict} the "
        f"sampling error of such a difference ({100 * error:.1f} points). The test split took no part in the choice; "
        f"on it, {best[0].name} reaches {stats.percent(stats.accuracy(best, 'test'))}.\n"
    )


def _baseline(groups: list[stats.Group]) -> str:
    """What batch norm, dropout, leaky ReLU and depth bought, where a run named baseline stands beside others."""
    base = next((group for group in groups if group[0].name == "baseline"), None)
    if base is None:
        return ""
    spec = base[0].spec
    others = [g for g in groups if g[0].spec["norm"] != "none" and g[0].spec["epochs"] == spec["epochs"]]
    if not others:
        return ""
    best = stats.ranked(others)[0]
    (test, gap), (base_test, base_gap) = (
        (100 * stats.accuracy(g, "test"), 100 * (stats.accuracy(g, "train") - stats.accuracy(g, "test")))
        for g in (best, base)
    )
    means = "; all are means over seeds" if len(best) > 1 or len(base) > 1 else ""
    return (
        "\n## What the network bought over the baseline\n\n"
        f"`baseline` has the hidden widths {spec['widths']} and {spec['activation']}, without batch norm or dropout. "
        f"Against it, {best[0].name} gains {test - base_test:+.2f} points of test accuracy ({base_test:.2f}% to "
        f"{test:.2f}%), and the gap between train and test goes from {base_gap:.1f} to {gap:.1f} points{means}.\n"
    )


OPTIONS = {"epochs": "--epochs", "batch_size": "--batch-size", "lr": "--lr", "seed": "--seed"}


def _commands(finished: list[Finished], experiments: Mapping[str, Spec]) -> list[str]:
    """What trains these runs again, those without options in one line."""
    plain, others = [], []
    for record in finished:
        name, spec = record.name, record.spec
        try:
            now = resolve(experiments[name])
        except (KeyError, SpecError):  # a name that is gone, or that stands for something which cannot be run
            now = {}
        changed = [key for key in spec if spec[key] != now.get(key)]
        if not changed:
            plain.append(name)
        elif set(changed) <= OPTIONS.keys():
            others.append(" ".join(["uv run main.py run", name, *(f"{OPTIONS[key]} {spec[key]}" for key in changed)]))
        else:
            others.append(f"# {name} ({record.spec_id}): its spec is in its record, and in experiments/ no more")
    commands = [" ".join(["uv run main.py run", *plain])] * bool(plain) + others
    return [*_first(commands, "# and {} more", ROWS - 1), "uv run main.py evaluate"]


def _place(record: Finished) -> str:
    where = record.environment
    return (
        f"- {where.device_name} ({where.hardware}), {where.threads} threads, torch {where.torch}, Python "
        f"{where.python}, commit {where.git}, data {record.data[:12]}"
    )


def markdown(records: list[Record], experiments: Mapping[str, Spec]) -> str:
    """The text of results.md; see rebuild."""
    finished = [r for r in records if isinstance(r, Finished)]
    groups = stats.groups(finished)
    best = stats.ranked(groups)[:ROWS]
    aggregate = len(records) > ROWS
    parts = [
        "# Results\n\nWritten by `main.py` from the records in `checkpoints/`; do not edit. Accuracies are measured in "
        "evaluation mode on all 45,000 train, 5,000 validation and 10,000 test images; the test split is read once, at "
        "the end of a run. The gap is train minus test, in points. The time is that of the steps, without compilation. "
    ]
    if aggregate:
        parts.append(
            f"There are more than {ROWS} runs, so a row stands for the finished runs that differ in the seed alone, "
            "with means ± standard deviations over the seeds; the best by validation come first.\n\n"
        )
        parts.append(_table(GROUP_COLUMNS, best))
        if len(best) < len(groups):
            left = len(finished) - sum(map(len, best))
            parts.append(
                f"\n{len(groups) - len(best):,} of {len(groups):,} rows, with {left:,} of {len(finished):,} finished "
                "runs, are left out. Every record is in `checkpoints/`.\n"
            )
    else:
        parts.append("`weights` is the start of the sha256 of the final weights.\n\n")
        parts.append(_table(RUN_COLUMNS, ([r] for r in records)))
    failures = [f"\n{r.name} failed: {r.error}.\n" for r in records if not isinstance(r, Finished)]
    parts += _first(failures, "\n{} more runs failed.\n")
    inexact = [
        f"\n{r.name} was resumed where its bits are not those of an uninterrupted run: --resume-anyway.\n"
        for r in finished
        if not r.bitwise
    ]
    parts += _first(inexact, "\n{} more runs were resumed in this way.\n")
    if choices := _choices(groups):
        parts += ["\n## Choice of the learning rate\n\n", "\n".join(choices)]
    seeds = [group for group in groups if len(group) > 1]
    if seeds and not aggregate:  # an aggregated table has these numbers
        parts += ["\n## Over seeds\n\n", _table(SEED_COLUMNS, seeds)]
    parts.append(_baseline(groups))
    if finished:
        parts.append(f"\n## Learning curves\n\n![accuracy and loss of every epoch]({plots.PICTURE})\n")
        parts.append("\n## Reproduce\n\n" + aggregate * "One seed of every row; `--seed` trains the others.\n\n")
        commands = _commands([group[0] for group in best] if aggregate else finished, experiments)
        places = _first(sorted({_place(r) for r in finished}), "- and {} more")
        parts.append("```sh\n" + "\n".join(commands) + "\n```\n\nMade on:\n\n" + "\n".join(places) + "\n")
    return "".join(parts)
