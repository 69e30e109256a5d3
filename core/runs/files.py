"""Finds files of the runs under a folder: resume points, leftovers of killed processes, weights."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.runs.record import Finished, read_each
from core.runs.run import InProgress, Run
from core.spec import resolve
from core.store import Held, delete, local, locked, reserve, sweep


def in_progress(out: Path) -> InProgress:
    """The runs under `out` that have resume points. One pass over the folders: to ask each of 10,000 runs would read
    the names of all files 10,000 times."""
    points = (local(out) / "checkpoints").glob("*/*.step-*.safetensors")
    return {(path.parent.name, path.name.split(".step-")[0]) for path in points}


def lock_results(out: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the report under `out` for this process; waits while another process holds it."""
    return locked(out / "checkpoints" / "results.lock", out / "checkpoints" / "results.owner")


def sweep_all(out: Path) -> None:
    """Delete the temporary files and owner files that killed processes left under `out`. Skips runs that another
    process is training.

    Raises:
        StoreError: `out` cannot be written, or its file system has no locks.
    """
    with lock_results(out):
        reserve(out / "results.md", 1, 1)
        sweep(out, "results.md")
        sweep(out / "checkpoints", "")  # the pictures and tables of the report
    left = [path for kind in ("tmp", "owner") for path in (out / "checkpoints").glob(f"*/*.{kind}")]
    for folder, run_id in sorted({(path.parent, path.name.split(".")[0]) for path in left}):
        with contextlib.suppress(Held), locked(folder / f"{run_id}.lock", timeout=0):
            sweep(folder, f"{run_id}.")
            delete(folder / f"{run_id}.owner")


def find_weights(
    out: Path,
    word: str,
    seed: int | None = None,
    spec: Mapping[str, Any] | None = None,
    former: Sequence[str] = (),
) -> Path:
    """The file of weights for a word of the command line: a path, an id, or the name of an experiment.

    Args:
        seed: of the run; None for the first one that has weights.
        spec: the current spec of the experiment in experiments/, if there is one. Runs of this spec are preferred.
        former: earlier names of the experiment.

    Raises:
        UserError: there is no such file, or there are several.
    """
    path = local(word)
    if path.exists() or path.name != word or word.endswith(".safetensors"):
        return path
    if re.fullmatch("[0-9a-f]{12}", word):
        paths = sorted((out / "checkpoints").glob(f"*/{word}.safetensors"))
        if not paths:
            raise UserError(f"there are no weights of the id {word} under {out}")
        return paths[0]
    runs = [run for run in _with_weights(out, word, former) if seed is None or run.seed == seed]
    if not runs:
        of_seed = "" if seed is None else f" --seed {seed}"
        train = f"`uv run main.py run {word}{of_seed}` trains it" if spec is not None else "names are in `main.py list`"
        raise UserError(f"there are no weights of {word}{of_seed} under {out}; {train}")
    wanted = None if spec is None else {**resolve(spec), "seed": 0}
    runs = [run for run in runs if {**run.spec, "seed": 0} == wanted] or runs
    first = min(run.seed for run in runs)
    runs = [run for run in runs if run.seed == first]
    if len(runs) > 1:
        ids = ", ".join(run.id for run in runs)
        raise UserError(f"there are several networks of {word} with seed {first}: say which by its id: {ids}")
    return runs[0].weights


def _with_weights(out: Path, name: str, former: Sequence[str]) -> list[Run]:
    """The finished runs of an experiment that have weights."""
    runs: dict[str, Run] = {}
    for folder in (name, *former):
        for record in read_each(sorted((out / "checkpoints" / folder).glob("*.json"))):
            run = Run(name, record.spec, out, former)
            if isinstance(record, Finished) and run.weights.exists():
                runs.setdefault(run.id, run)
    return [runs[run_id] for run_id in sorted(runs)]
