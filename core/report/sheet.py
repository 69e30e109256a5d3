"""results.csv: a row for each run, with all that its record says in one number or word, and `current`: whether its code
and data are those that results.md compares."""

import csv
import io
from collections.abc import Iterable
from typing import Any

import msgspec

from core.report import stats
from core.runs.record import Environment, Finished, Record
from core.spec import FIELDS

RUNS = "checkpoints/results.csv"
SPLITS = ("train", "validation", "test")
NUMBERS = (*(f"{split}_{what}" for split in SPLITS for what in ("accuracy", "loss")), "parameters")
MADE = ("seconds", "first_step_seconds", "samples_per_second", "digest", "bitwise")
WHERE = tuple(field.name for field in msgspec.structs.fields(Environment))
HEADINGS = ("experiment", "spec_id", "status", *FIELDS, *NUMBERS, *MADE, *WHERE, "data", "current", "error")


def runs(records: Iterable[Record]) -> str:
    """The text of results.csv, a row for each record; a failed run has an error and no number."""
    records = list(records)
    results = stats.results(records)
    return write(HEADINGS, (_row(record, results.has(record)) for record in records))


def _row(record: Record, current: bool) -> list[Any]:
    finished = isinstance(record, Finished)
    row: list[Any] = [record.name, record.spec_id, "finished" if finished else "failed"]
    row += [stats.shown(v) if isinstance(v, list) else v for v in (record.spec[key] for key in FIELDS)]
    if isinstance(record, Finished):
        for split in SPLITS:
            metrics = getattr(record.metrics, split)
            row += [metrics.accuracy, metrics.loss] if metrics else ["", ""]
        row += [record.parameters, round(stats.seconds(record), 3), record.first_step_seconds, stats.speed(record)]
        row += [record.digest, record.bitwise]
    else:
        row += [""] * (len(NUMBERS) + len(MADE))
    row += [getattr(record.environment, name) for name in WHERE]
    return [*row, record.data, current, "" if isinstance(record, Finished) else record.error]


def write(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return out.getvalue()
