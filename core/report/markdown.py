"""The text of results.md: one function for each section."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_high
from typing import Any

from core.code_hash import same_numbers
from core.compare import DIFFERENCE
from core.data import cifar10, datasets
from core.report import best_run, comparisons, plots, published, questions, searches, stats, tables, text
from core.report.catalog import Catalog
from core.report.plots import Picture
from core.report.questions import Asked
from core.report.searches import Searched
from core.report.stats import Group, Results
from core.runs.record import Failed, Finished, Record

HEADER = "# Results\n\nWritten by `main.py` from the records in `checkpoints/`; do not edit."
OTHER = "Runs of other code or other data"
LOCAL = (
    'A "local" network has a prior that the published ones do not have: each unit of its first layers has a place in '
    "the image, and its weights for what is far from it are scaled down throughout training (the key `locality`, "
    "docs/accuracy.md). "
)
LEGEND = f"""- A row of a suite is an experiment, the best by validation first. Its n runs differ in the seed alone.
- 57.12 ± 0.31% (56.74–57.50): the mean over the seeds, the standard deviation of one seed, and the 95% confidence
  interval of the mean (Student's t). Where n is 1, it is the interval of one accuracy measured on so many images
  (Wilson); it says nothing about other seeds.
- The gap is train minus test accuracy, in points.
- The time is that of all steps of a run, without compilation. Time and samples/s are medians over the runs of one
  machine: the one that trained the first seed of the row. If the rows of a table are of several machines, the column
  "time on" names them; the table of other experiments always has it.
- A comparison is a difference of accuracies, in points, with its 95% interval. It is paired over the seeds that both
  experiments have. With one seed there is no interval.
- The intervals of all comparisons of a section are valid together and at every look: with 95%, none of them is wrong,
  however often seeds were added (docs/compare.md). Few seeds have the interval of one look: it also holds for all
  comparisons of the section together, but only if the number of seeds was chosen in advance.
- The verdict is by validation. A difference is significant if its interval does not contain 0.
- Seeds needed: with so many seeds, the interval excludes 0 or all of {DIFFERENCE:g} points, if mean and deviation
  stay the same.
- Images: how many test images only the first network gets right, and how many only the second, with the p value of the
  exact McNemar test. The networks are those of the first seed that both experiments have.
- Every run, with its whole spec, is a row of [results.csv]({tables.RESULTS_CSV}).
- The learning curves of every experiment are in [learning-curves.csv]({tables.CURVES_CSV}): at most {plots.MAX_POINTS}
  epochs of each, evenly spaced, with the first and the last. Its column `epochs` is the number of epochs of the run.
"""

Columns = dict[str, Callable[[Group], str]]


def _spread(split: str) -> Callable[[Group], str]:
    return lambda group: stats.spread_on(group, split)


def _interval(group: Group, split: str) -> str:
    low, high = stats.mean_interval(group, split)
    return f"({100 * low:.2f}–{100 * high:.2f})"


VALIDATION, TEST, TRAIN = map(_spread, ("validation", "test", "train"))
NUMBERS: Columns = {
    "gap": lambda g: f"{stats.gap(g):.1f}",
    "time": lambda g: f"{stats.training(g):.0f} s",
    "samples/s": lambda g: f"{median_high(map(stats.speed, stats.timed(g))):,}",
}
SIMPLE: Columns = {
    "experiment": lambda g: g.label,
    "n": lambda g: f"{len(g):,}",
    "validation": VALIDATION,
    "test": TEST,
    "train": TRAIN,
    "classes": lambda g: str(len(g[0].data_info.classes)),
    "epochs": lambda g: str(g[0].spec["epochs"]),
}


def _simple(*names: str) -> Columns:
    """Some of the columns that several tables have."""
    return {name: SIMPLE[name] for name in names}


COLUMNS: Columns = {
    **_simple("experiment", "n"),
    "validation": lambda g: f"{VALIDATION(g)} {_interval(g, 'validation')}",
    "test": lambda g: f"**{TEST(g)}** {_interval(g, 'test')}",
    "train": TRAIN,
    **NUMBERS,
    "lr": lambda g: stats.shown(g[0].spec["lr"]),
    "parameters": lambda g: f"{g[0].parameters:,}",
    **_simple("epochs"),
    "precision": lambda g: g[0].spec["precision"],
}


def markdown(
    records: list[Record],
    catalog: Catalog,
    pictures: Mapping[str, Picture] = {},
    group_by: str | None = None,
    asked: Sequence[Asked] = (),
    searched: Sequence[Searched] = (),
) -> str:
    """The text of results.md, from sorted records.

    Args:
        pictures: those that are on disk, by path.
        group_by: a key of the spec, for one more table.
        asked: the questions of `compare`.
        searched: the searches of `search`.
    """
    records = searches.other(records, searched)
    shown = {path: f"\n{_image(path, pictures)}\n{picture.table}" for path, picture in pictures.items()}
    results = stats.results(records, catalog.spec)
    groups = stats.ranked(results.compared)
    trained_on_all = sorted(results.trained_on_all, key=lambda group: published.work(group[0]))
    members = by_suite(groups, catalog)
    suites = {name: suite(name, those, shown) for name, those in members.items()}
    if suites:
        suites[next(iter(suites))] += shown.get(plots.CURVES, "")
    sections = [
        introduction(results),
        problems(records, results),
        *(section for name, section in suites.items() if name and name not in catalog.ablations),
        comparisons.gain(groups),
        best_by_time(trained_on_all, shown) if results.dataset == "cifar10" else on_all_images(trained_on_all),
        questions.section(asked, shown),
        searches.section(searched, shown),
        *(suites[name] for name in catalog.ablations if name in suites),
        comparisons.what_helped(groups, catalog),
        suites.get("", ""),
        by_key(groups, group_by),
        best_experiment(members, pictures, shown),
        other_data_sets(results),
        details(groups + trained_on_all, results, catalog),
    ]
    return "\n".join(filter(None, sections))


def by_suite(groups: list[Group], catalog: Catalog) -> dict[str, list[Group]]:
    """The suites that have experiments, the default suite first. Under "", at the end, experiments of no suite, and
    variants: runs whose options changed the spec of an experiment."""
    names = sorted(catalog.suites, key=lambda name: name != catalog.default)
    known = {name for suite in catalog.suites.values() for name in suite}
    own = [group for group in groups if not group.variant]
    found = {name: [group for group in own if group[0].name in catalog.suites[name]] for name in names}
    found[""] = [group for group in groups if group.variant or group[0].name not in known]
    return {name: members for name, members in found.items() if members}


def introduction(results: Results) -> str:
    images = ""
    if results.compared:
        metrics = results.compared[0][0].metrics
        n = [f"{split.n:,}" for split in (metrics.train, metrics.validation, metrics.test) if split]
        images = f" on all {n[0]} train, {n[1]} validation and {n[2]} test images"
    other = "" if results.data == cifar10.DIRECTORY_HASH else f" The data are not CIFAR-10: {results.data[:12]}."
    if results.dataset != "cifar10":
        other = f" The data set is {_title(results.dataset)}.{_note(results.dataset)}"
    return (
        f"{HEADER} Accuracies are measured in evaluation mode{images}. A run reads the test split once, "
        f"at its end. Every choice below is made by validation.{other}\n"
    )


def problems(records: list[Record], results: Results) -> str:
    """Which runs failed, are not exact, or are not compared?"""
    failures, inexact = [], []
    for r in records:
        if isinstance(r, Failed):
            other = "" if results.has(r) else " (other code or data)"
            failures.append(f"{r.name}, seed {r.seed}, failed{other}: {r.error}.\n")
        elif isinstance(r, Finished) and not r.exact:
            inexact.append(
                f"{r.name}, seed {r.seed}, is not exact: it went on from a resume point where its bits are not those "
                "of an uninterrupted run (--resume-anyway, or in another cohort).\n"
            )
    lines = text.limited(failures, "{} more runs failed.\n")
    lines += text.limited(inexact, "{} more runs were resumed in this way.\n")
    if count := sum(map(len, results.other)):
        runs = "1 finished run is" if count == 1 else f"{count:,} finished runs are"
        lines.append(f"{runs} of other code or on other data, and not compared: see [{OTHER}](#details).\n")
    return "\n".join(lines)


def suite(name: str, members: list[Group], shown: Mapping[str, str]) -> str:
    """How good are the experiments of a suite, and which learning rate is best?"""
    heading = f"Suite {name}" if name else "Other experiments"
    intervals = shown.get(plots.suite_path(name), "")
    return f"## {heading}\n\n{_table(COLUMNS, members, not name)}{comparisons.choice(members)}{intervals}"


def _table(columns: Columns, rows: list[Group], mixed: bool = False) -> str:
    """A table with times. If these are of several machines, or the rows are `mixed` ones, which a reader compares with
    those of other tables, a column names the machine of each row."""
    several = mixed or len({stats.machine(stats.timed(group)[0]) for group in rows[: text.ROWS]}) > 1
    return text.table({**columns, "time on": stats.where} if several else columns, rows)


def by_key(groups: list[Group], key: str | None) -> str:
    """How good is each value of a key of the spec?"""
    if key is None:
        return ""
    columns: Columns = {
        key: lambda g: g.label,
        **_simple("n"),
        "experiments": lambda g: f"{len({r.name for r in g}):,}",
        **_simple("validation", "test", "train"),
        **NUMBERS,
    }
    values = stats.grouped_by((record for group in groups for record in group), key)
    return (
        f"## By {key}\n\nMeans ± standard deviations over all runs with this value. The runs may differ in other keys, "
        f"too.\n\n{_table(columns, values)}"
    )


def best_by_time(groups: list[Group], shown: Mapping[str, str]) -> str:
    """How good are the runs that were trained on all images, beside what is published?"""
    if not groups:
        return ""
    return (
        "## Best by time\n\nThese runs were trained on all 50,000 images, as the published networks were. They have no "
        f"validation accuracy and take part in no choice. {LOCAL if any(g[0].spec['locality'] for g in groups) else ''}"
        "Accuracies are means over n seeds ± the standard deviation of "
        "one. Training is the time of all steps: the median over the runs on the machine that trained the first seed. "
        "With compilation, the longest time to a first step is added; it includes whitening and, unless the step was "
        "compiled before, compilation. PetaFLOP are 6 operations for each parameter and image, and the whitening of "
        f"each image.\n\n{text.table(published.columns(groups), groups)}{shown.get(published.TIME, '')}"
        "\nPublished results without convolution. Those of Neyshabur used Fast AutoAugment; docs/accuracy.md says what "
        "each used. No paper gives the time of training:\n\n"
        f"{text.table(published.PAPERS, published.PUBLISHED)}{shown.get(published.PICTURE, '')}"
    )


def best_experiment(members: dict[str, list[Group]], pictures: Mapping[str, Picture], shown: Mapping[str, str]) -> str:
    """What does the best experiment of the first suite get wrong, and what has it learnt?"""
    parts = [shown.get(path, "") for path in (best_run.CONFUSION, best_run.MISTAKES)]
    layers = {title: _image(path, pictures) for path, title in best_run.FIRST_LAYERS.items() if path in pictures}
    parts += [f"\n{text.grid(layers, [layers.values()])}"] if layers else []
    if not any(parts):
        return ""
    name, (best, *_) = next(iter(members.items()))
    of_suite = f" of the suite {name}" if name else ""
    return f"## The best experiment{of_suite} by validation: {best.label}\n{''.join(parts)}"


def details(groups: list[Group], results: Results, catalog: Catalog) -> str:
    """What a reader looks up: folded."""
    parts = [
        text.folded("How to read the tables", LEGEND) if groups else "",
        text.folded(OTHER, other_runs(results, catalog)) if results.other else "",
        text.folded("Reproduce", _shell([*_commands(groups, catalog), "uv run main.py evaluate"])) if groups else "",
        text.folded("Made on", made_on(groups)) if groups else "",
    ]
    return f"## Details\n{''.join(parts)}" if any(parts) else ""


def other_runs(results: Results, catalog: Catalog) -> str:
    """Which runs are not compared, and how are they trained again?"""

    def code(group: Group) -> str:
        hash_of_code = group[0].environment.code
        return "this" if same_numbers(hash_of_code) else hash_of_code or "unknown"

    columns: Columns = {
        **_simple("experiment", "n", "validation", "test", "epochs"),
        "code": code,
        "data": lambda g: "this" if g[0].data == results.data else g[0].data[:12],
    }
    return (
        "Other code or other data can give other numbers. These runs are therefore in no other table, mean, choice, "
        "comparison or picture of this report. A row is an experiment, with one code and one data set. "
        f"In [results.csv]({tables.RESULTS_CSV}), the column `current` of these runs is False.\n\n"
        f"{text.table(columns, results.other)}\nThese commands train them again, with this code and on "
        f"{_title(results.dataset)}:\n\n"
        f"{_shell(_commands(results.other, catalog, ' --force'))}"
    )


def other_data_sets(results: Results) -> str:
    """How good are the runs on other data sets?"""
    if not results.other_datasets:
        return ""
    columns = _simple("experiment", "n", "validation", "test", "train", "classes", "epochs")
    sections = [
        "\n\n".join(filter(None, [f"### {_title(name)}", _note(name).strip(), text.table(columns, groups)]))
        for name, groups in results.other_datasets.items()
    ]
    apart = "These runs are in no other table, mean, choice, comparison or picture of this report."
    return "\n".join([f"## Other data sets\n\n{apart}\n", *sections])


def on_all_images(groups: list[Group]) -> str:
    """How good are the runs that were trained on all images of another data set than CIFAR-10?"""
    if not groups:
        return ""
    columns = _simple("experiment", "n", "test", "epochs")
    return f"## Trained on all images\n\n{text.table(columns, groups)}"


def _title(dataset: str) -> str:
    """The name of a data set in a sentence."""
    return datasets.REGISTRY[dataset].title if dataset in datasets.REGISTRY else dataset


def _note(dataset: str) -> str:
    """What a reader should know of results with a data set, after a space."""
    note = datasets.REGISTRY[dataset].note if dataset in datasets.REGISTRY else ""
    return f" {note}" if note else ""


MACHINES: dict[str, Callable[[list[Finished]], str]] = {
    "machine": lambda made: stats.machine(made[0])[0],
    "hardware": lambda made: stats.machine(made[0])[1],
    "threads": lambda made: f"{stats.machine(made[0])[2]}",
    "runs": lambda made: f"{len(made):,}",
    "mode": lambda made: _listed(f"{r.environment.mode} on {r.environment.device}" for r in made),
    "torch": lambda made: _listed(r.environment.torch for r in made),
    "Python": lambda made: _listed(r.environment.python for r in made),
    "commits": lambda made: _listed(r.environment.git for r in made),
}


def made_on(groups: list[Group]) -> str:
    """Which machines trained these runs?"""
    runs: dict[tuple[str, str, int], list[Finished]] = defaultdict(list)
    for record in (record for group in groups for record in group):
        runs[stats.machine(record)].append(record)
    table = text.table(MACHINES, [made for _, made in sorted(runs.items())])
    return f"A row is a machine. The data are {groups[0][0].data[:12]}.\n\n{table}"


def _listed(values: Iterable[str]) -> str:
    return text.listed(sorted(set(values)))


def _image(path: str, pictures: Mapping[str, Picture]) -> str:
    return f"![{pictures[path].alt}]({path})"


def _shell(commands: list[str]) -> str:
    return "```sh\n" + "".join(f"{command}\n" for command in commands) + "```\n"


def _commands(groups: list[Group], catalog: Catalog, end: str = "") -> list[str]:
    """The commands that train these runs again; experiments with the same options share a line."""
    names: dict[str, list[str]] = defaultdict(list)
    unknown = []
    for group in groups:
        name, spec = group[0].name, group[0].spec
        if (now := catalog.spec(name)) is None:
            unknown.append(f"# {name} ({group[0].spec_id}): its spec is in its record, and in experiments/ no more")
            continue
        changed = [override(key, spec[key]) for key in spec if key != "seed" and spec[key] != now[key]]
        names[" ".join(["", *changed, *_seeds([record.seed for record in group], now["seed"])])].append(name)
    commands = [f"uv run main.py run {' '.join(those)}{options}{end}" for options, those in names.items()]
    return text.limited(commands + unknown, "# and {} more", text.ROWS - 1)


def override(key: str, value: Any) -> str:
    """The word that gives a key this value on a command line: lr=0.001. PowerShell splits a word that has a comma, so
    there are quotes around widths."""
    if key == "dataset" and value not in datasets.REGISTRY:
        return "--data-folder DIR"
    if isinstance(value, list):
        return f'"{key}={",".join(map(str, value)) or "none"}"'
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _seeds(seeds: list[int], default: int) -> list[str]:
    if seeds == [default]:
        return []
    if len(seeds) == 1:
        return [f"--seed {seeds[0]}"]
    if seeds == list(range(len(seeds))):
        return [f"--seeds {len(seeds)}"]
    return [f'--seeds "{",".join(map(str, seeds))}"']
