"""results.md, its pictures and its tables: a view of the records, rebuilt from them and from nothing else."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core import store
from core.data import cifar10
from core.report import best_run, markdown, metrics, plots, published, sheet, stats
from core.report.catalog import Catalog
from core.runs import files
from core.runs.files import Run, lock_results
from core.runs.record import Record, read_records
from core.spec import FIELDS, SpecError, nearest

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20  # of a file of a report on disk; what is larger is not ours
MAX_WEIGHTS = 256 << 20  # bytes of a file of weights to draw
SUITES = 10  # pictures of suites, at most

# How the files of a report begin, but for the pictures. A file that begins otherwise is not ours.
BEGINNINGS = {
    "results.md": markdown.HEADER,
    sheet.RUNS: ",".join(sheet.HEADINGS[:3]) + ",",
    plots.CURVES_TABLE: "experiment,epoch,",
    metrics.METRICS: '{\n "test": {',
}
PICTURES = (plots.CURVES, published.PICTURE, best_run.CONFUSION, best_run.MISTAKES, best_run.FILTERS)


def prepare(out: Path, catalog: Catalog) -> None:
    """Find out before anything is trained whether a report can be written, and delete what killed processes left.

    Raises:
        core.store.StoreError: a file of the report cannot be written, or one with its name is not ours.
    """
    check(out, catalog)
    files.sweep_all(out)
    for name in _names(catalog):
        store.reserve(_target(out / name), 1, 1)


def check(out: Path, catalog: Catalog) -> None:
    """Raise StoreError where a file with the name of a file of the report is not ours. Nothing is written."""
    for name in _names(catalog):
        path = out / name
        if not os.path.lexists(path):
            continue
        try:
            data = store.read_file(path, MAX_BYTES).replace(b"\r\n", b"\n")  # Git may have changed the ends of lines
        except FileNotFoundError:
            continue  # a link to a file that does not exist yet
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise store.StoreError(f"cannot write {path}: what is there cannot be read ({reason})") from None
        if not (data.startswith(BEGINNINGS[name].encode()) if name in BEGINNINGS else plots.is_picture(data)):
            raise store.StoreError(
                f"{path} was not written by this program and is left as it is: move it away, or name another folder "
                "with --out"
            )


def _names(catalog: Catalog) -> list[str]:
    """The files that a report may have, relative to its folder."""
    return [*BEGINNINGS, *PICTURES, *map(plots.suite_path, catalog.suites)]


def _target(path: Path) -> Path:
    """The file to write for a file of the report: a link stays a link, and the file that it names is written. A file
    that is read-only is not: DVC may have made it, as a part of its cache, and links to it."""
    target = Path(os.path.realpath(path))
    return path if target.exists() and not target.stat().st_mode & 0o222 else target


def rebuild(
    out: str | Path,
    catalog: Catalog,
    data: Path | None = None,
    redraw: bool = False,
    group_by: str | None = None,
) -> list[Record]:
    """Bring results.md, its pictures, results.csv and metrics.json under `out` up to date; a file that is right already
    is not touched.

    A picture of test images or of weights is drawn where these are at hand. Elsewhere the one on disk stays, and
    results.md shows it as long as it is the right one. Where no picture can be drawn, a warning in the log says why.

    Args:
        catalog: what the names of experiments stand for now.
        data: the folder of CIFAR-10.
        redraw: draw the pictures even where those on disk say that they are right.
        group_by: a key of the spec; results.md then also has a table by its values.

    Returns:
        All records that can be read, sorted.

    Raises:
        core.spec.SpecError: there is no such key.
        core.store.StoreError: a file cannot be written, or one with its name is not ours; the old files are
            intact.
    """
    if group_by is not None and group_by not in FIELDS:
        raise SpecError(f"cannot group by {group_by!r}: it is no key of a spec{nearest(group_by, list(FIELDS))}")
    out = store.local(out)
    check(out, catalog)
    with lock_results(out):
        records = sorted(read_records(out), key=stats.order)
        results = stats.results(records)
        shown, undrawn = {}, False
        for picture in _pictures(out, results.compared, results.whole, catalog, data):
            there = plots.identifier(picture) in _on_disk(out / picture.path)
            if redraw or not there:
                try:
                    drawn = plots.draw(picture)
                except plots.PictureError as error:
                    drawn = None
                    if not undrawn:
                        log.warning("%s", error)
                    undrawn = True
                if drawn:
                    _update(out / picture.path, drawn)
                    there = True
            if there:
                shown[picture.path] = picture
        table = plots.curves_as_table(stats.ranked(results.compared) + results.whole)
        _update(out / plots.CURVES_TABLE, table.encode())
        _update(out / sheet.RUNS, sheet.runs(records).encode())
        _update(out / metrics.METRICS, metrics.metrics(results.compared, results.whole).encode())
        _update(out / "results.md", markdown.markdown(records, catalog, shown, group_by).encode())
    return records


def _pictures(
    out: Path, groups: list[stats.Group], whole: list[stats.Group], catalog: Catalog, data: Path | None
) -> Iterator[plots.Picture]:
    """The pictures that a report of these groups has, of which `whole` were trained on all images."""
    if whole:
        yield published.picture(whole)
    if not groups:
        return
    best = stats.ranked(groups)[0]
    run = max(best, key=lambda record: stats.accuracies([record], "validation"))
    # The first, as it takes the most memory: it is given back before matplotlib is loaded.
    if mistakes := best_run.mistakes(run, cifar10.CLASSES, lambda indices: _test_images(data, indices)):
        yield mistakes
    yield best_run.filters(run, lambda: _first_layer(Run(out, run.name, run.spec_id).weights))
    if confusion := best_run.confusion(best, cifar10.CLASSES):
        yield confusion
    compared = {suite: [group for group in groups if group[0].name in names] for suite, names in catalog.suites.items()}
    several = [suite for suite, members in compared.items() if len({group[0].name for group in members}) > 1]
    for suite in several[:SUITES]:
        yield plots.intervals(suite, compared[suite])
    yield plots.curves(groups, catalog.suites.get(catalog.default, ()))


def _test_images(data: Path | None, indices: list[int]) -> Any:
    """Images of the test split, uint8 [n, 3072]; None where the data is not there."""
    if data is None or cifar10.missing(data):
        return None
    try:
        return cifar10.read_batch(data, "test_batch")[b"data"][indices]
    except cifar10.DataError:  # whoever trains on it or evaluates is told
        return None


def _first_layer(path: Path) -> Any:
    """The weights of the first layer in a file of weights, float32 [units, 3072]; None where they cannot be had."""
    import numpy as np
    import safetensors.numpy
    from safetensors import SafetensorError

    try:
        weights = safetensors.numpy.load(store.read_file(path, MAX_WEIGHTS))["1.weight"]
    except (OSError, ValueError, KeyError, SafetensorError):  # `main.py evaluate` says what is wrong
        return None
    return weights if weights.ndim == 2 and weights.shape[1] == 3072 and np.isfinite(weights).all() else None


def _on_disk(path: Path) -> bytes:
    """The content of a file; nothing where it cannot be read."""
    try:
        return store.read_file(path, MAX_BYTES)
    except (OSError, ValueError):
        return b""


def _update(path: Path, data: bytes) -> None:
    if _on_disk(path) != data:
        store.atomic_write(_target(path), data)
