"""Brings results.md, its pictures and its tables up to date with the records."""

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from core import compare, space, store
from core.data import datasets
from core.data.tensors import DataError
from core.report import best_run, markdown, plots, published, questions, searches, stats, tables
from core.report.catalog import Catalog
from core.report.plots import Picture
from core.runs import files
from core.runs.files import lock_results
from core.runs.record import Finished, Record, former_names, read_records
from core.runs.run import Run
from core.spec import CIFAR10, FIELDS, SpecError, nearest

MAX_BYTES = 64 << 20  # of a file of a report on disk; a larger file is not ours
MAX_WEIGHTS = 256 << 20  # bytes of a file of weights to draw

# How the files of a report begin. A file that begins otherwise is not ours; a picture has an identifier.
BEGINNINGS = {
    "results.md": markdown.HEADER,
    tables.RESULTS_CSV: ",".join(tables.HEADINGS[:3]) + ",",
    tables.CURVES_CSV: "experiment,epoch,",
    tables.METRICS_JSON: '{\n "test": {',
}
PICTURES = (
    *(plots.CURVES, published.PICTURE, published.TIME),
    *(best_run.CONFUSION, best_run.MISTAKES, best_run.FILTERS, best_run.LOCAL),
)


def prepare(out: Path, catalog: Catalog) -> None:
    """Delete what killed processes left, and raise StoreError if a report cannot be written."""
    check(out, catalog)
    files.sweep_all(out)
    for name in _names(out, catalog):
        store.reserve(_target(out / name), 1, 1)


def check(out: Path, catalog: Catalog) -> None:
    """Raise StoreError if the report would replace a file that this program did not write. Writes nothing."""
    for name in _names(out, catalog):
        path = out / name
        data = _on_disk(path).replace(b"\r\n", b"\n")  # Git may have changed the line ends
        ours = data.startswith(BEGINNINGS[name].encode()) if name in BEGINNINGS else plots.is_picture(data)
        if path.exists() and not ours:
            raise store.StoreError(
                f"cannot write {path}: the file there was not written by this program, or cannot be read. Move it "
                "away, or name another folder with --out"
            )


def _names(out: Path, catalog: Catalog) -> list[str]:
    """The files that a report may have, relative to its folder."""
    asked = [question.picture for question in compare.read_all(out, catalog.former)]
    found = map(searches.picture_path, space.read_all(out))
    return [*BEGINNINGS, *PICTURES, *map(plots.suite_path, catalog.suites), *asked, *found]


def _target(path: Path) -> Path:
    """The file to write: a link stays a link, and its target is written. A link to a read-only file is replaced: DVC
    links to read-only files of its cache, which must not change."""
    target = Path(os.path.realpath(path))
    return path if target.exists() and not target.stat().st_mode & 0o222 else target


def rebuild(
    out: str | Path, catalog: Catalog, data: Path | None = None, redraw: bool = False, group_by: str | None = None
) -> list[Record]:
    """Bring the files of the report under `out` up to date, and return all records that can be read, sorted.

    A file that is right is not touched. A picture of test images or of weights is drawn if these are available. If
    not, the one on disk stays, and results.md shows it if it is still the right one.

    Args:
        data: the folder of the published data.
        redraw: draw also the pictures that are up to date.
        group_by: a key of the spec; adds a table by its values to results.md.

    Raises:
        core.spec.SpecError: there is no such key.
        core.store.StoreError: a file cannot be written, or one with its name is not ours; the old files are intact.
    """
    if group_by is not None and group_by not in FIELDS:
        raise SpecError(f"cannot group by {group_by!r}: it is no key of a spec{nearest(group_by, list(FIELDS))}")
    out = store.local(out)
    check(out, catalog)
    with lock_results(out):
        records = sorted(read_records(out, catalog.former), key=stats.order)
        asked = questions.asked(out, records, catalog.former)
        searched = searches.searched(out, records, asked)
        results = stats.results(searches.other(records, searched), catalog.spec)
        drawn = itertools.chain(
            _pictures(out, results, catalog, data), questions.pictures(asked), searches.pictures(searched)
        )
        shown = {p.path: p for p in drawn if _draw(p, out / p.path, redraw)}
        _update(out / tables.CURVES_CSV, tables.curves_csv(results).encode())
        _update(out / tables.RESULTS_CSV, tables.results_csv(records, results).encode())
        _update(out / tables.METRICS_JSON, tables.metrics_json(results).encode())
        _update(out / "results.md", markdown.markdown(records, catalog, shown, group_by, asked, searched).encode())
    return records


def _draw(picture: Picture, path: Path, redraw: bool) -> bool:
    """Bring a picture up to date; returns whether the file shows it."""
    current = plots.identifier(picture) in _on_disk(path)
    if current and not redraw:
        return True
    drawn = plots.draw(picture)
    if drawn:
        _update(path, drawn)
    return current or drawn is not None


def _pictures(out: Path, results: stats.Results, catalog: Catalog, data: Path | None) -> Iterator[Picture]:
    """The pictures of a report."""
    groups = stats.ranked(results.compared)
    suites = markdown.by_suite(groups, catalog)
    if suites:
        first = next(iter(suites.values()))
        best = first[0]
        run = _by_validation(best)[0]
        # Early, as it takes the most memory: it is given back before matplotlib is loaded.
        if mistakes := best_run.mistakes(run, run.data_info.classes, partial(_test_images, data, run)):
            yield mistakes
        yield _filters(best_run.FILTERS, best, out, catalog)
        if confusion := best_run.confusion(best, run.data_info.classes):
            yield confusion
        yield plots.curves(first)
        local = [group for group in groups + results.trained_on_all if group[0].spec["locality"]]
        if local and local[0] is not best:
            yield _filters(best_run.LOCAL, local[0], out, catalog)
    for suite, members in suites.items():
        if suite and len({group[0].name for group in members}) > 1:
            yield plots.intervals(suite, members)
    if results.trained_on_all and results.dataset == "cifar10":
        yield published.picture(results.trained_on_all)
        shown = (members[0] for suite, members in suites.items() if suite and suite not in catalog.ablations)
        yield published.against_time([*shown, *results.trained_on_all])


def _by_validation(group: stats.Group) -> list[Finished]:
    """The runs, the best first; those that were trained on all images stay in order."""
    return sorted(group, key=lambda run: -run.metrics.validation.accuracy if run.metrics.validation else 0.0)


def _filters(path: str, group: stats.Group, out: Path, catalog: Catalog) -> Picture:
    """The first layer of the best run by validation whose weights, or whose picture, are here."""
    drawn, pictures = _on_disk(out / path), list[Picture]()
    for run in _by_validation(group):
        weights = Run(run.name, run.spec, out, former_names(run.name, catalog.former)).weights
        pictures.append(best_run.filters(path, run, partial(_first_layer, weights)))
        if weights.is_file() or plots.identifier(pictures[-1]) in drawn:
            return pictures[-1]
    return pictures[0]


def _test_images(data: Path | None, run: Finished, indices: list[int]) -> Any:
    """Images of the test split, uint8 [n, 3072]; None if there are no data."""
    dataset = datasets.REGISTRY.get(run.spec["dataset"])  # a folder of images is not in it
    if data is None or dataset is None or run.data_info.shape != CIFAR10.shape:
        return None
    where = datasets.home(dataset.name, data)
    if dataset.missing(where):
        return None
    try:
        return dataset.test_images(where)[indices]
    except DataError:  # a command that needs the data reports it
        return None


def _first_layer(path: Path) -> Any:
    """The weights of the first layer in a file of weights, float32 [units, 3072]; None if they cannot be read."""
    import numpy as np
    import safetensors.numpy
    from safetensors import SafetensorError

    try:
        weights = safetensors.numpy.load(store.read_file(path, MAX_WEIGHTS))["1.weight"]
    except (OSError, ValueError, KeyError, SafetensorError):  # `main.py evaluate` reports it
        return None
    return weights if weights.ndim == 2 and weights.shape[1] == 3072 and np.isfinite(weights).all() else None


def _on_disk(path: Path) -> bytes:
    """The content of a file; empty if it cannot be read."""
    try:
        return store.read_file(path, MAX_BYTES)
    except (OSError, ValueError):
        return b""


def _update(path: Path, data: bytes) -> None:
    if _on_disk(path) != data:
        store.atomic_write(_target(path), data)
