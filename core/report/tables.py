"""The tables for other programs: results.csv has a row for each run, learning-curves.csv a row for each epoch, and
metrics.json the mean accuracies that DVC compares between commits (dvc.yaml)."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from core.report import plots, stats, text
from core.report.stats import Results
from core.runs.record import Environment, Failed, Finished, Record, read_records
from core.spec import FIELDS

RESULTS_CSV = "checkpoints/results.csv"
CURVES_CSV = "checkpoints/learning-curves.csv"
METRICS_JSON = "checkpoints/metrics.json"
TRAINED_ON_ALL = "test_trained_on_all"  # a key of metrics.json
MAX_CURVE_ROWS = 50_000  # of learning-curves.csv, about: with very many experiments, each has fewer points


def _metric(split: str, what: str) -> Callable[[Finished], Any]:
    return lambda r: getattr(getattr(r.metrics, split), what, None)


# The measurements of a finished run, by heading. Every other run has empty cells.
MEASUREMENTS: dict[str, Callable[[Finished], Any]] = {
    **{f"{s}_{what}": _metric(s, what) for s in ("train", "validation", "test") for what in ("accuracy", "loss")},
    "parameters": lambda r: r.parameters,
    "seconds": lambda r: round(stats.seconds(r), 3),
    "first_step_seconds": lambda r: r.first_step_seconds,
    "samples_per_second": stats.speed,
    "digest": lambda r: r.digest,
    "bitwise": lambda r: r.exact,
}
HEADINGS = (
    *("experiment", "spec_id", "status", *FIELDS, *MEASUREMENTS),
    *(*Environment.__struct_fields__, "data", "current", "error"),
)


def row(record: Record) -> dict[str, Any]:
    """A record as one flat dict; docs/json.md has its keys. What a record of its kind does not have is None."""
    numbers = dict.fromkeys(MEASUREMENTS)
    if isinstance(record, Finished):
        numbers = {name: measure(record) for name, measure in MEASUREMENTS.items()}
    return {
        "experiment": record.name,
        "spec_id": record.spec_id,
        "status": record.__struct_config__.tag,
        **record.spec,
        **numbers,
        **msgspec.structs.asdict(record.environment),
        "data": record.data,
        "error": record.error if isinstance(record, Failed) else None,
    }


def records(out: str | Path = ".") -> list[dict[str, Any]]:
    """The records of all runs under `out`, each as `row` has it. `pandas.DataFrame(records())` is a frame of them.

    A file that is not a record is skipped, with a warning in the log.
    """
    return [row(record) for record in read_records(out)]


def histories(out: str | Path = ".") -> list[dict[str, Any]]:
    """The epochs of all runs under `out`: a dict for each, with the experiment, the id and the seed of its run and what
    core.runs.record.Epoch has. `pandas.DataFrame(histories())` is a frame of them. A failed run has no epochs.
    """
    return [
        {"experiment": run.name, "spec_id": run.spec_id, "seed": run.seed, **msgspec.structs.asdict(epoch)}
        for run in read_records(out)
        if not isinstance(run, Failed)
        for epoch in run.history
    ]


def results_csv(records: list[Record], results: Results) -> str:
    """A row for each run. `current` says whether its code and data are those that results.md compares."""
    rows = ({**row(record), "current": results.has(record)} for record in records)
    return _csv(HEADINGS, ([_cell(each[key]) for key in HEADINGS] for each in rows))


def _cell(value: Any) -> Any:
    return stats.shown(value) if isinstance(value, list) else value


def curves_csv(results: Results) -> str:
    """The learning curves of all experiments, each at evenly spaced epochs. `epochs` says how many epochs there were. A
    number that the runs do not have is an empty cell."""
    groups = stats.ranked(results.compared) + results.trained_on_all
    curves = ((group, plots.curve(group, curve_points(len(groups)))) for group in groups)
    rows = (
        (curve.label, epoch, len(group[0].history), *("" if math.isnan(x) else round(x, 6) for x in values))
        for group, curve in curves
        for epoch, *values in zip(curve.epochs, *curve.lines.values(), strict=True)
    )
    return _csv(("experiment", "epoch", "epochs", *plots.LINES), rows)


def curve_points(groups: int) -> int:
    """How many epochs of each group learning-curves.csv has, at most."""
    return max(2, min(plots.MAX_POINTS, MAX_CURVE_ROWS // max(1, groups)))


def metrics_json(results: Results) -> str:
    """The mean accuracies of the best experiments, apart from those of runs that were trained on all images.

    DVC joins the keys with dots, to `test.lr-1e-3`. The name comes last, since it may have dots of its own.
    """
    best, on_all = stats.ranked(results.compared)[: text.ROWS], results.trained_on_all[: text.ROWS]
    parts = {"test": (best, "test"), "validation": (best, "validation"), TRAINED_ON_ALL: (on_all, "test")}
    means: dict[str, dict[str, float]] = {}
    for name, (groups, split) in parts.items():
        means[name] = {group.label: round(stats.accuracy(group, split), 6) for group in groups}
    return json.dumps(means, indent=1, sort_keys=True) + "\n"


def _csv(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return out.getvalue()
