"""Prints lines of plain text and tables."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from core.errors import UserError
from core.estimate import Estimate
from core.report import stats
from core.report.markdown import override
from core.runs.run import Run
from core.spec import FIELDS, Spec, changed
from core.tally import Tally

NARROW = 60  # columns
ROWS = 30  # the most rows of a table
LISTED = 20  # the most classes in a sentence

# In a notebook, rich would make a block of HTML of each line. Lines of text work in Jupyter, Colab and VS Code alike; a
# bar does not.
PLAIN: dict[str, Any] = {"force_jupyter": False, "force_terminal": False} if Console().is_jupyter else {}
console = Console(highlight=False, markup=False, emoji=False, **PLAIN)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, **PLAIN)


def open_standard_streams() -> None:
    """Open standard streams that were closed when the process started. Print a character that the encoding of a stream
    lacks as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: without this, the next file would take it
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("core")
    log.handlers, log.propagate = [Warnings()], False


def printable(text: str) -> str:
    """The text as one line. Control characters, which a name or a file may contain, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print a line on stdout. Only the terminal wraps it."""
    console.print(printable(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a line on stderr."""
    errors.print(printable(text), soft_wrap=True)


def note(text: str) -> None:
    """Print a note on stderr. It is no error: `--quiet` hides it, as it does the lines of `say`."""
    if not console.quiet:
        warn(text)


def fail(error: Exception) -> None:
    """Print the error that ended a command: a line, or a paragraph if a UserError has several arguments."""
    first, *more = error.args if isinstance(error, UserError) and error.args else [error]
    for line in (f"error: {first}", *map(str, more)):
        warn(line)


class Warnings(logging.Handler):
    """Prints the warnings of other modules, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.printed:
            self.printed.add(text)
            warn(text)


def interrupted(stop: Any, tally: Tally, again: str) -> None:
    """Say which runs were stopped, and how to go on.

    Args:
        stop: core.schedule.Interrupted.
    """
    if stop.runs:
        run, *others = stop.runs
        where = f"after step {stop.step} of {stop.total}, which is saved" if stop.step else "before its first step"
        more = f"; so did {len(others)} others" if others else ""
        warn(f"{run.label} stopped {where}{more}; {again}")
    elif tally.done:
        warn(f"stopped between two runs, {tally.done:,} of {tally.total:,} done; {again}")
    else:
        warn("stopped before the first step")


def duration(seconds: float) -> str:
    """'41 s', '9 min', '2 h 5 min'."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def estimate(of: Estimate, while_trained: bool = False) -> str:
    """'about 82 s, 15.2 MB'; with `while_trained`, also the disk space for resume points."""
    seconds = "time not measured here yet" if of.seconds is None else _about(of.seconds)
    meanwhile = f", and {decimal(of.meanwhile)} while one is trained" if while_trained else ""
    return f"{seconds}, {decimal(of.kept)}{meanwhile}"


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 1 else "under a second"


@contextlib.contextmanager
def fetching() -> Iterator[Callable[[str, int, int], None]]:
    """A function for core.data.datasets.load to call while it downloads. Shows a bar for each source."""
    tasks: dict[str, Any] = {}
    with Progress(console=errors, transient=True, disable=console.quiet or not errors.is_terminal) as bars:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what), total=total)
            bars.update(tasks[what], completed=done)

        yield show


def keys() -> None:
    """Print each key of a spec with its default, values and meaning."""
    rows = ((key, stats.shown(field.default), str(field.values), field.meaning) for key, field in FIELDS.items())
    _print_table(("key", "default", "values", "meaning"), rows)


def suites(members: Mapping[str, Sequence[Run]], default: str, estimate: Callable[[Iterable[Spec]], Estimate]) -> None:
    """Print each suite, and below it its experiments: name, id, time and disk space of one seed, and the keys that
    differ from their defaults, as words of a command line.

    Args:
        estimate: the time and disk space of runs with these specs.
    """

    def expected(runs: Sequence[Run]) -> str:
        found = estimate(run.spec for run in runs)
        return f"{'not measured' if found.seconds is None else _about(found.seconds)}\n{decimal(found.kept)}"

    rows = []
    for suite, runs in members.items():
        name = f"{suite} (the default)" if suite == default else suite
        rows += [("", "", ""), (name, expected(runs), "the whole suite")]
        for run in runs:
            words = " ".join(override(key, value) for key, value in changed(run.spec).items())
            rows.append((f"  {run.name}\n  {run.id}", expected([run]), words or "all defaults"))
    _print_table(("experiment, id", "time, disk", "changed keys"), rows)


def _print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table that is as wide as the terminal, or 80 columns where there is none. Longer words are folded."""
    grid = Table(box=None, pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def keys_as_json() -> None:
    """Print the same as a line of JSON for each key."""
    for key, field in FIELDS.items():
        as_json({"key": key, "default": field.default, "values": str(field.values), "meaning": field.meaning})


def table(tally: Tally) -> None:
    """Print the results of the finished runs: a row for each experiment, the best ROWS if there are more."""
    names = list(tally.results) if len(tally.results) <= ROWS else tally.ranked()[:ROWS]
    if console.width < NARROW:
        columns = ["experiment", "validation", "test"]
    elif tally.seeds:
        columns = ["experiment", "seeds", "train", "validation", "test"]
    else:
        columns = ["experiment", "lr", "epochs", "train", "validation", "test", "95%", "samples/s"]
    rows = []
    for name in names:
        spec, group = tally.specs[name], tally.results[name]
        test = group[0].metrics.test
        low, high = stats.interval(test.accuracy, test.n)
        row = {
            "experiment": name,
            "lr": f"{spec['lr']:g}",
            "epochs": str(spec["epochs"]),
            "seeds": str(len(group)),
            "train": stats.spread_on(group, "train"),
            "validation": stats.spread_on(group, "validation"),
            "test": stats.spread_on(group, "test"),
            "95%": f"{100 * low:.1f}-{100 * high:.1f}",
            "samples/s": f"{median_high(map(stats.speed, group)):,}",
        }
        rows.append([row[column] for column in columns])
    if names:
        _print_table(columns, rows)
    if len(names) < len(tally.results):
        say(f"the best {ROWS} of {len(tally.results):,} experiments by validation accuracy")


def as_json(line: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON on stdout; docs/json.md has the keys. Under `--json`, main.py sends all other
    lines to stderr."""
    print(json.dumps(line), flush=True)


def estimate_as_json(run: Run, of: Estimate, **more: str) -> None:
    """Print the estimate for a run as one line of JSON."""
    numbers = {"estimated_seconds": of.seconds, "estimated_bytes": of.kept}
    as_json({"experiment": run.name, "spec_id": run.id, **more, **run.spec, **numbers})


def differences(heading: Sequence[str], parts: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Print the values of two runs side by side: a block of rows for each part that is not empty."""
    grid = Table("", *heading, box=None, pad_edge=False)
    for title, pairs in parts.items():
        if pairs:
            grid.add_row(title.replace("_", " "))
        for key, pair in pairs.items():
            grid.add_row(f"  {key}", *(_value(key, value) for value in pair))
    console.print(grid)


def _value(key: str, value: Any) -> str:
    if value is None or value == "":
        return "none"
    if key.endswith("accuracy"):
        return stats.percent(value)
    return printable(value[:12] if key in ("digest", "diff") else stats.shown(value))


def evaluation(path: Path, about: Any, evaluated: Any) -> None:
    """Print the evaluation of a checkpoint.

    Args:
        about: core.runs.record.Weights.
        evaluated: core.predict.Evaluation.
    """
    result, recorded = evaluated.result, evaluated.recorded
    low, high = stats.interval(result["accuracy"], result["n"])
    numbers = f"{stats.percent(recorded.accuracy)}, {recorded.loss:.4f}" if recorded else "no such evaluation"
    if evaluated.same:
        verdict = "as recorded" if recorded else "the run did not evaluate in this way"
        verdict = f"the run had other data: {evaluated.other_data}" if evaluated.other_data else verdict
    else:
        verdict = f"the run recorded {numbers}, weights {evaluated.digest[:12]}"
    views = {
        "none": "",
        "flip": ", averaged over each image and its mirror image",
        "shifts": ", averaged over nine shifts of each image and their mirror images",
    }
    say(
        f"{about.name} ({path}): {stats.percent(result['accuracy'])} of {result['n']:,} test images"
        f"{views[evaluated.tta]} (95% interval {100 * low:.2f}-{100 * high:.2f}%), loss {result['loss']:.4f}; {verdict}"
    )
    classes = list(zip(about.data_info.classes, result["correct"], result["count"], strict=True))
    least = ""
    if len(classes) > LISTED:
        classes = sorted(classes, key=lambda each: each[1] / each[2])[:LISTED]
        least = f"the {LISTED} classes with the lowest accuracy: "
    say(f"  {least}" + ", ".join(f"{label} {100 * hit / count:.1f}%" for label, hit, count in classes))


def prediction(path: Path, classes: Sequence[str], top_k: Sequence[tuple[int, float]]) -> None:
    """Print classes of an image with their probabilities, as core.predict.top_k returns them."""
    say(f"{path}: " + ", ".join(f"{classes[i]} {stats.percent(probability)}" for i, probability in top_k))


def prediction_as_json(path: Path, classes: Sequence[str], top_k: Sequence[tuple[int, float]]) -> None:
    """Print the same as one line of JSON."""
    probabilities = [{"class": classes[i], "probability": probability} for i, probability in top_k]
    as_json({"image": str(path), "classes": probabilities})


def evaluation_as_json(path: Path, about: Any, evaluated: Any) -> None:
    """Print the same as one line of JSON."""
    line = {
        "checkpoint": str(path),
        "experiment": about.name,
        "seed": about.seed,
        "test_accuracy": evaluated.result["accuracy"],
        "test_loss": evaluated.result["loss"],
        "n": evaluated.result["n"],
        "tta": evaluated.tta,
        "recorded_test_accuracy": evaluated.recorded.accuracy if evaluated.recorded else None,
    }
    as_json(line)
