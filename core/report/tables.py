"""The tables for other programs: results.csv has a row for each run, learning-curves.csv a row for each epoch, and
metrics.json the mean accuracies that DVC compares between commits (dvc.yaml)."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from core.report import plots, stats, text
from core.report.stats import Results
from core.runs.record import Environment, Failed, Finished, Record
from core.spec import FIELDS

RESULTS_CSV = "checkpoints/results.csv"
CURVES_CSV = "checkpoints/learning-curves.csv"
METRICS_JSON = "checkpoints/metrics.json"
TRAINED_ON_ALL = "test_trained_on_all"  # a key of metrics.json
MAX_CURVE_ROWS = 50_000  # of learning-curves.csv, about: with very many experiments, each has fewer points


def _metric(split: str, what: str) -> Callable[[Finished], Any]:
    return lambda r: getattr(getattr(r.metrics, split), what, "")


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
ENVIRONMENT = [field.name for field in msgspec.structs.fields(Environment)]
HEADINGS = ("experiment", "spec_id", "status", *FIELDS, *MEASUREMENTS, *ENVIRONMENT, "data", "current", "error")


def results_csv(records: list[Record], results: Results) -> str:
    """A row for each run. `current` says whether its code and data are those that results.md compares."""
    return _csv(HEADINGS, (_row(record, results.has(record)) for record in records))


def _row(record: Record, current: bool) -> list[Any]:
    numbers = [measure(record) if isinstance(record, Finished) else "" for measure in MEASUREMENTS.values()]
    status, error = record.__struct_config__.tag, record.error if isinstance(record, Failed) else ""
    spec = [stats.shown(v) if isinstance(v := record.spec[key], list) else v for key in FIELDS]
    environment = [getattr(record.environment, name) for name in ENVIRONMENT]
    return [record.name, record.spec_id, status, *spec, *numbers, *environment, record.data, current, error]


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
