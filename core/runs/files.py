"""Finds files of the runs under a folder: resume points, leftovers of killed processes, weights, records."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.runs.layout import read_each
from core.runs.record import Finished, read_record
from core.runs.run import InProgress, Run
from core.spec import resolve
from core.store import Held, Leftover, delete, local, locked, reserve

DEAD = "temporary file of a dead process"
# What a search writes under its own lock. All else that lies directly in checkpoints/ belongs to the report.
OF_SEARCH = re.compile(r"(search-.+)\.(?:json|journal|owner)(?:\.\d+\.tmp)?")
SUFFIXES = {".safetensors": "are no weights", ".json": "is no record"}  # of a run, and what `find_file` says without it


def in_progress(out: Path) -> InProgress:
    """The runs under `out` that have resume points. One pass over the folders: to ask each of 10,000 runs would read
    the names of all files 10,000 times."""
    points = (local(out) / "checkpoints").glob("*/*.step-*.safetensors")
    return {(path.parent.name, path.name.split(".step-")[0]) for path in points}


def lock_results(out: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the report under `out` for this process; waits while another process holds it."""
    return locked(out / "checkpoints" / "results.lock", out / "checkpoints" / "results.owner")


def sweep_all(out: Path) -> None:
    """Delete the temporary files and owner files that killed processes left under `out`. Skips those of live processes.

    Raises:
        StoreError: `out` cannot be written, or its file system has no locks.
    """
    with lock_results(out):
        reserve(out / "results.md", 1, 1)
    for leftover in list(_temporary_files(out)):
        with contextlib.suppress(Held), locked(leftover.lock, timeout=0):
            delete(*leftover.paths)


def _temporary_files(out: Path) -> Iterator[Leftover]:
    """Temporary files and owner files under `out`, each with the lock that its process holds while it is alive."""
    folder = out / "checkpoints"
    for pattern in ("*/*.[0-9]*.tmp", "*/*.owner"):
        for path in folder.glob(pattern):
            yield Leftover([path], DEAD, path.with_name(f"{path.name.split('.')[0]}.lock"))
    for path in (*folder.glob("*.[0-9]*.tmp"), *folder.glob("search-*.owner"), *out.glob("results.md.[0-9]*.tmp")):
        search = OF_SEARCH.fullmatch(path.name)
        yield Leftover([path], DEAD, folder / f"{search[1] if search else 'results'}.lock")


def leftovers(out: Path) -> Iterator[Leftover]:
    """What dead processes left under `out`, and the resume points of finished runs.

    A run that is trained again with --force has a result and resume points. It needs those that are newer than the
    result to go on, so they are no leftovers.
    """
    yield from _temporary_files(out)
    for name, run_id in sorted(in_progress(out)):
        record = out / "checkpoints" / name / f"{run_id}.json"
        written = [record] if record.exists() else []
        if any(isinstance(each, Finished) for each in read_each(written, read_record)):
            for path in sorted(record.parent.glob(f"{run_id}.step-*.safetensors")):
                if path.stat().st_mtime <= record.stat().st_mtime:
                    yield Leftover([path], "resume point of a finished run", record.with_suffix(".lock"))


def weights(out: Path, name: str) -> Iterator[Leftover]:
    """The weights of an experiment. Without them, a run counts as not finished."""
    for path in sorted((out / "checkpoints" / name).glob("*.safetensors")):
        if ".step-" not in path.name:
            yield Leftover([path], "weights", path.with_suffix(".lock"))


def kind(word: str) -> str:
    """Whether a word of the command line means a run by a "file", an "id" or the "name" of its experiment."""
    path = local(word)
    if path.exists() or path.name != word or path.suffix in SUFFIXES:
        return "file"
    return "id" if re.fullmatch("[0-9a-f]{12}", word) else "name"


def find_file(
    out: Path,
    word: str,
    seed: int | None = None,
    spec: Mapping[str, Any] | None = None,
    former: Sequence[str] = (),
    suffix: str = ".safetensors",
    dataset: Callable[[], str | None] = lambda: None,
) -> Path:
    """The weights or the record for a word of the command line: a path, an id, or the name of an experiment.

    Args:
        seed: of the run; None for the first one that has such a file.
        spec: the current spec of the experiment in experiments/, if there is one. Runs of this spec are preferred.
        former: earlier names of the experiment.
        suffix: .safetensors for the weights, .json for the record. A path may have the other one.
        dataset: returns the data set that is meant, or None. Called only if a name has runs on several.

    Raises:
        UserError: there is no such file, or there are several.
    """
    means, what = kind(word), SUFFIXES[suffix]
    if means == "file":
        path = local(word)
        return path.with_suffix(suffix) if path.suffix in SUFFIXES else path
    if means == "id":
        paths = sorted((out / "checkpoints").glob(f"*/{word}{suffix}"))
        if not paths:
            raise UserError(f"there {what} of the id {word} under {out}")
        return paths[0]
    runs = [run for run in _runs(out, word, former, suffix) if seed is None or run.seed == seed]
    if not runs:
        of_seed = "" if seed is None else f" --seed {seed}"
        train = f"`uv run main.py run {word}{of_seed}` trains it" if spec is not None else "names are in `main.py list`"
        raise UserError(f"there {what} of {word}{of_seed} under {out}; {train}")
    of_data = {run.spec["dataset"]: run for run in sorted(runs, key=lambda run: -run.seed)}  # the first seed of each
    if len(of_data) > 1:
        if (meant := dataset()) not in of_data:  # to guess would be an answer in the classes of other images
            ids = ", ".join(f"{run.id} ({name})" for name, run in sorted(of_data.items()))
            raise UserError(f"there are runs of {word} on several data sets: say which by its id, such as {ids}")
        runs = [run for run in runs if run.spec["dataset"] == meant]
    wanted = None if spec is None else {**resolve(spec), "seed": 0}
    runs = [run for run in runs if {**run.spec, "seed": 0} == wanted] or runs
    first = min(run.seed for run in runs)
    runs = [run for run in runs if run.seed == first]
    if len(runs) > 1:
        ids = ", ".join(run.id for run in runs)
        raise UserError(f"there are several networks of {word} with seed {first}: say which by its id: {ids}")
    return runs[0].record if suffix == ".json" else runs[0].weights


def _runs(out: Path, name: str, former: Sequence[str], suffix: str) -> list[Run]:
    """The runs of an experiment that have such a file."""
    runs: dict[str, Run] = {}
    for folder in (name, *former):
        for record in read_each(sorted((out / "checkpoints" / folder).glob("*.json")), read_record):
            run = Run(name, record.spec, out, former)
            if suffix == ".json" or (isinstance(record, Finished) and run.weights.exists()):
                runs.setdefault(run.id, run)
    return [runs[run_id] for run_id in sorted(runs)]
